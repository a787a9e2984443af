"""The best choice at each of many limits, and at each of several batch sizes: what quality costs.

The batch is no variable of the problem: it is solved once for each, and the best of them kept (arXiv 2411.19146,
appendix B). Costs at another batch than the one they are of: bytes are counted anew, predicted times predicted anew,
measured times changed in the proportion in which the roofline model changes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from components.core.errors import InputError
from components.search.counting import counted, counted_fixed, kv_heads_of
from components.search.devices import device_named, device_of
from components.search.problem import Problem
from components.search.results import SearchTable
from components.search.roofline import predicted, predicted_fixed
from components.search.solver import MAX_NODES, Solution, solve_problem
from components.search.table import Costs, OptionTable

THROUGHPUT = "tokens_per_s"
"""The one limit that is a least; it is a most on `request_ms`."""


@dataclass(frozen=True)
class Point:
    """The best choice under one limit at one batch.

    Attributes:
        batch: requests; None where the table has costs of one batch alone.
        limit: value of the swept limit.
        solution: None where no choice is within the limits.
        best: whether no other batch gives a better score at this limit.
    """

    batch: int | None
    limit: float
    solution: Solution | None
    best: bool = True


def sweep(
    problem_under: Callable[[Mapping[str, float]], Problem],
    name: str,
    values: Sequence[float],
    batch: int | None = None,
) -> list[Point]:
    """The best choice at each value of a limit, in the order of the values.

    Args:
        problem_under: the problem under a value of the swept limit, by name.
        name: of the swept limit.
        values: of it.
        batch: kept with the points.
    """
    found: dict[float, Solution | None] = {}
    last: Solution | None = None
    for value in sorted(set(values), reverse=name == THROUGHPUT):  # what fits here fits under what follows
        last = solve_problem(
            problem_under({name: value}), known=[] if last is None else [last.choice], max_nodes=MAX_NODES
        )
        found[value] = last
    return [Point(batch, value, found[value]) for value in values]


def mark_best(fronts: Sequence[Sequence[Point]]) -> list[list[Point]]:
    """The same points, one row a batch, those marked that no other batch beats at the same value."""

    def marked(column: Sequence[Point]) -> list[Point]:
        least = min((point.solution.objective for point in column if point.solution), default=None)
        return [
            replace(point, best=point.solution is not None and point.solution.objective == least) for point in column
        ]

    return [list(row) for row in zip(*(marked(column) for column in zip(*fronts, strict=True)), strict=True)]


def at_batch(search: SearchTable, batch: int) -> OptionTable:
    """The options of a search with the costs of another batch.

    Raises:
        InputError: the search does not know what its costs are of, or of which device.
    """
    old, shape = search.measurement, search.architecture
    if old is None or shape is None:
        raise InputError(
            "this search did not keep what its costs are of", hint="run it again: earlier versions did not"
        )
    device = device_named(search.machine.device) if old.device is None else device_of(old.device)
    if device is None:
        raise InputError(
            f"nothing is known of {search.machine.device!r}, so costs at another batch cannot be told",
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

    outside = counted_fixed(search.fixed.parameters, shape, new)
    fixed = scaled(
        search.fixed, predicted_fixed(outside, shape, old, device), predicted_fixed(outside, shape, new, device)
    )
    table = OptionTable(fixed=fixed, slots=search.slots, batch_tokens=new.batch_tokens)
    return table.priced(lambda option: moved(option.costs))
