"""Best scores over a range of limits: Pareto fronts, and sweeps at several batch sizes.

The batch size is no variable of the problem: it is solved once for each size, and the best is marked (arXiv 2411.19146,
appendix B). `option_table.at_batch` gives the costs at another batch size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from components.core.base.config import Config
from components.search.costs.resources import Costs
from components.search.solver.option_table import OptionTable
from components.search.solver.problem import Problem
from components.search.solver.solve import MAX_NODES, Solution, minimise, solve, solve_problem


class ParetoPoint(Config):
    """The best choice at one latency limit, under the other limits unchanged."""

    limit_ms: float
    """Latency limit."""
    choice: tuple[int, ...]
    """Number of the chosen option of each slot."""
    score: float
    """Sum of its scores."""
    costs: Costs
    """Predicted, before fusion."""


class FrontPoint(Config):
    """The best choice at one limit of a resource, under the other limits unchanged."""

    limit: float
    """Of the resource."""
    choice: tuple[int, ...]
    """Number of the chosen option of each slot."""
    score: float
    """Sum of its scores."""
    costs: Costs
    """Predicted, before fusion."""


FRONTS = ("parameters", "memory_bytes", "request_ms")
"""Resources besides latency whose front `search.json` has."""
THROUGHPUT = "tokens_per_s"
"""The only lower limit; it is solved as an upper limit on `request_ms`."""


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
        batch: batch size that the points are for.
    """
    found: dict[float, Solution | None] = {}
    last: Solution | None = None
    for value in sorted(set(values), reverse=name == THROUGHPUT):  # what fits here fits under what follows
        last = solve_problem(
            problem_under({name: value}), mip_start=[] if last is None else [last.choice], max_nodes=MAX_NODES
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


def pareto_front(
    table: OptionTable, limits: Mapping[str, float], num_points: int, resource: str = "latency_ms"
) -> list[tuple[float, Solution]]:
    """The best choice at each of several limits of one resource, under the other limits unchanged.

    Returns:
        Limit and solution, from the least that the other limits allow to the parent's own; a single limit where that
        least is not below the parent's.
    """
    others = {name: limit for name, limit in limits.items() if name != resource}
    cheapest = minimise(table, table.costs_of(resource), others)
    if cheapest is None:
        return []
    least, most = (table.costs(choice).of(resource) for choice in (cheapest.choice, table.parent_choice))
    if least >= most:  # measured: what the other limits leave may be no faster than the parent
        num_points, most = 1, least
    steps = [least + (most - least) * k / max(1, num_points - 1) for k in range(num_points)]
    return [(limit, solve(table, {**others, resource: limit})) for limit in steps]


def latency_front(table: OptionTable, limits: Mapping[str, float], points: int) -> tuple[ParetoPoint, ...]:
    """The best score over the time of a decode step."""
    return tuple(
        ParetoPoint(limit_ms=limit, choice=best.choice, score=best.objective, costs=table.costs(best.choice))
        for limit, best in pareto_front(table, limits, points)
    )


def other_fronts(table: OptionTable, limits: Mapping[str, float], points: int) -> dict[str, tuple[FrontPoint, ...]]:
    """The best score over each resource of `FRONTS` that the costs know."""
    parent = table.costs(table.parent_choice)
    return {
        resource: tuple(
            FrontPoint(limit=limit, choice=best.choice, score=best.objective, costs=table.costs(best.choice))
            for limit, best in pareto_front(table, limits, points, resource)
        )
        for resource in FRONTS
        if parent.of(resource)
    }
