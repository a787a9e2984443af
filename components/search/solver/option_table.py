"""Score and costs of every option of every slot: the input of the solver, and the main part of `search.json`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

from components.core.base.config import Config
from components.core.base.errors import InputError
from components.core.model.accelerators import device_named, device_of
from components.core.model.architecture import Architecture
from components.search.config import Measurement
from components.search.costs.resources import Costs, counted, counted_fixed, kv_heads_of
from components.search.costs.roofline import predicted, predicted_fixed
from components.search.solver.problem import Problem
from components.search.space.layer_space import PARTS, LayerSpace, Part, Size, Variant


class Option(Config):
    """One variant of one slot."""

    name: str
    """Name of the variant."""
    size: Size
    """KV heads or channels; 0 is the no-op, `linear` one matrix."""
    score: float
    """Replace-one-block KL(parent || child), nats a token; the parent's own is 0."""
    costs: Costs
    """Its costs."""


class Slot(Config):
    """The attention or the FFN of a layer; a choice has exactly one option for it."""

    layer: int
    """Layer of the parent, from 0."""
    part: Part
    """Attention or FFN."""
    options: tuple[Option, ...]
    """Its options, the parent's own first."""
    fixed_option: int | None = None
    """Number of the option that the recipe fixes; None where it fixes none."""

    @property
    def allowed_options(self) -> tuple[int, ...]:
        """Numbers of the options that a choice may take."""
        return tuple(range(len(self.options))) if self.fixed_option is None else (self.fixed_option,)


class OptionTable(Config):
    """All slots of the parent, and what no choice changes."""

    fixed: Costs
    """Embeddings, final norm and head; the part of a decode step that no sub-block takes."""
    slots: tuple[Slot, ...]
    """Attention and FFN of every layer, in the order they are computed."""
    batch_tokens: int = 0
    """New tokens of the batch that `request_ms` is the time of; 0 where it is not known."""

    def costs(self, choice: Sequence[int]) -> Costs:
        """Cost of the model in which slot k has its option `choice[k]`."""
        return sum((slot.options[pick].costs for slot, pick in zip(self.slots, choice, strict=True)), start=self.fixed)

    def score(self, choice: Sequence[int]) -> float:
        """Estimated quality loss of a model: the sum of its replace-one-block scores, nats a token."""
        return sum(slot.options[pick].score for slot, pick in zip(self.slots, choice, strict=True))

    @property
    def parent_choice(self) -> tuple[int, ...]:
        """The choice that changes nothing."""
        return (0,) * len(self.slots)

    @property
    def fixed_options(self) -> dict[int, int]:
        """The option of each slot whose option is fixed, by number of the slot."""
        return {number: slot.fixed_option for number, slot in enumerate(self.slots) if slot.fixed_option is not None}

    @property
    def scores(self) -> list[list[float]]:
        """Score of each option of each slot."""
        return [[option.score for option in slot.options] for slot in self.slots]

    def costs_of(self, resource: str) -> list[list[float]]:
        """What each option of each slot takes of one resource."""
        return [[option.costs.of(resource) for option in slot.options] for slot in self.slots]

    def priced(self, costs: Callable[[Option], Costs]) -> Self:
        """The same options with other costs."""
        slots = tuple(
            slot.model_copy(
                update={"options": tuple(option.model_copy(update={"costs": costs(option)}) for option in slot.options)}
            )
            for slot in self.slots
        )
        return self.model_copy(update={"slots": slots})

    def problem(self, scores: Sequence[Sequence[float]], limits: Mapping[str, float]) -> Problem:
        """What the solver is given; what no choice changes is the first cost that counts against a limit.

        Args:
            scores: what to minimise, of each option of each slot.
            limits: absolute, by resource.
        """
        fixed = {resource: self.fixed.of(resource) for resource in limits}
        costs = {resource: self.costs_of(resource) for resource in limits}
        return Problem.of(scores, costs, limits, fixed).with_fixed(self.fixed_options)

    def variants(self, choice: Sequence[int]) -> list[tuple[Variant, Variant]]:
        """The attention and the FFN of each layer of a choice."""
        picked = [Variant(slot.part, slot.options[pick].size) for slot, pick in zip(self.slots, choice, strict=True)]
        return list(zip(picked[::2], picked[1::2], strict=True))


def option_table(
    spaces: Sequence[LayerSpace],
    fixed: Costs,
    blocks: Mapping[str, Costs],
    scores: Mapping[tuple[int, Variant], float],
    batch_tokens: int = 0,
) -> OptionTable:
    """Put together what the solver chooses from.

    Args:
        spaces: options of each layer.
        fixed: what no choice changes.
        blocks: costs by name of the variant.
        scores: replace-one-block KL of every variant but the parent's own, which changes nothing.
        batch_tokens: new tokens of the batch that times are of.
    """
    slots = []
    for layer, space in enumerate(spaces):
        for part in PARTS:
            own, *others = space.of(part)
            kls = {own: 0.0} | {variant: scores[layer, variant] for variant in others}
            options = tuple(
                Option(name=variant.name, size=variant.size, score=kl, costs=blocks[variant.name])
                for variant, kl in kls.items()
            )
            fixed_numbers = [number for number, variant in enumerate(kls) if variant in space.fixed]
            slots.append(
                Slot(layer=layer, part=part, options=options, fixed_option=fixed_numbers[0] if fixed_numbers else None)
            )
    return OptionTable(fixed=fixed, slots=tuple(slots), batch_tokens=batch_tokens)


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
            "search.json has no measurement or architecture, which costs at another batch size need",
            hint="run the search again: earlier versions did not write them",
        )
    device = device_named(processor) if old.device is None else device_of(old.device)
    if device is None:
        raise InputError(
            f"no data sheet of {processor!r}, so costs at another batch size cannot be predicted",
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
