"""Costs of a finished search at another batch size."""

from components.core.base.errors import InputError
from components.core.model.architecture import Architecture
from components.search.config import Measurement
from components.search.costs.memory import counted, counted_fixed, kv_heads_of
from components.search.costs.resources import Costs
from components.search.costs.roofline import predicted, predicted_fixed
from components.search.devices import device_named, device_of
from components.search.solver.option_table import OptionTable


def at_batch(
    table: OptionTable, batch: int, *, measurement: Measurement | None, parent: Architecture | None, processor: str
) -> OptionTable:
    """The options of a search with the costs of another batch size.

    Args:
        table: options with their costs at the batch size of `measurement`.
        batch: the new batch size, requests.
        measurement: load that the costs are of; None where the search did not keep it.
        parent: shape of the parent; None where the search did not keep it.
        processor: name of the processor or accelerator on which times were measured.

    Raises:
        InputError: load or shape are not known, or nothing is known of the processor.
    """
    old, shape = measurement, parent
    if old is None or shape is None:
        raise InputError(
            "this search did not keep what its costs are of", hint="run it again: earlier versions did not"
        )
    device = device_named(processor) if old.device is None else device_of(old.device)
    if device is None:
        raise InputError(
            f"nothing is known of {processor!r}, so costs at another batch cannot be told",
            hint="search with measurement.batch_size set to it, or with measurement.device",
        )
    cached = None if old.cached_tokens is None else max(1, old.cached_tokens * batch // old.batch_size)
    new = old.model_copy(update={"batch_size": batch, "cached_tokens": cached})

    def scaled(costs: Costs, before: Costs, after: Costs) -> Costs:
        if old.device is not None:
            return after
        latency, first = (
            costs.of(time) * after.of(time) / before.of(time) if before.of(time) else 0.0
            for time in ("latency_ms", "time_to_first_token_ms")
        )
        return after.timed(latency_ms=latency, time_to_first_token_ms=first, new_tokens=new.new_tokens)

    def moved(costs: Costs) -> Costs:
        counts = counted(costs.parameters, kv_heads_of(costs, shape.head_dim), shape.head_dim, new)
        return scaled(costs, predicted(counts, shape, old, device), predicted(counts, shape, new, device))

    outside = counted_fixed(table.fixed.parameters, shape, new)
    fixed = scaled(
        table.fixed, predicted_fixed(outside, shape, old, device), predicted_fixed(outside, shape, new, device)
    )
    moved_table = OptionTable(fixed=fixed, slots=table.slots, batch_tokens=new.batch_tokens)
    return moved_table.priced(lambda option: moved(option.costs))
