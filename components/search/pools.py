"""Several good choices: the best, then each time the best of those that differ from all before."""

import math
import time

from components.search.problem import Problem
from components.search.solver import Solution, TimeIsOver, solve_problem


def pool(problem: Problem, count: int, *, distance: int = 1, time_limit_s: float = math.inf) -> list[Solution]:
    """The best choices, best first.

    Args:
        problem: options and limits.
        count: how many; fewer come back where there are no more, or time is over.
        distance: slots in which any two differ at least; 1 gives the `count` best.
        time_limit_s: for all of them.

    Source: arXiv 2411.19146, appendix B (there at most a share alpha of the layers may agree).
    """
    deadline = time.monotonic() + time_limit_s
    found: list[Solution] = []
    while len(found) < count:
        try:
            solution = solve_problem(problem, time_limit_s=deadline - time.monotonic())
        except TimeIsOver:
            if found:
                return found
            raise
        if solution is None:
            break
        found.append(solution)
        problem = problem.away_from(solution.choice, distance)
    return found
