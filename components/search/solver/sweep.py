"""The best choice at each of many limits, and at each of several batch sizes: what quality costs.

The batch is no variable of the problem: it is solved once for each, and the best of them kept (arXiv 2411.19146,
appendix B). Costs at another batch than the one they are of: bytes are counted anew, predicted times predicted anew,
measured times changed in the proportion in which the roofline model changes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from components.search.solver.problem import Problem
from components.search.solver.solve import MAX_NODES, Solution, solve_problem

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
