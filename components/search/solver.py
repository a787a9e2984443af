"""The best choice of one sub-block a slot within limits, exactly: a grouped knapsack, solved by HiGHS with gap 0.

    minimise    sum_kj score(k, j) x[k, j]
    subject to  sum_kj cost_r(k, j) x[k, j] <= limit_r - fixed_r    for each limited resource r
                sum_j x[k, j] = 1                                   for each slot k

Source: arXiv 2411.19146, appendix B. Attention and FFN are slots of their own (decoupled blocks), since scores add up.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import highspy
from pydantic import JsonValue

from components.core.errors import InfeasibleBudget
from components.search.config import Limits
from components.search.table import RESOURCES, Costs, OptionTable

TOLERANCE = 1e-9
"""By which share of a limit a choice may exceed it: the solver's own precision."""


@dataclass(frozen=True)
class Solution:
    """What the solver found.

    Attributes:
        choice: option number of each slot.
        objective: sum of the scores, nats a token.
        bound: no choice within the limits scores below this.
        gap: relative distance of the two; 0 is a proof.
        status: the solver's own word.
    """

    choice: tuple[int, ...]
    objective: float
    bound: float
    gap: float
    status: str


def absolute_limits(limits: Limits, parent: Costs) -> dict[str, float]:
    """The limits that are set, as numbers; shares are taken of the parent's cost."""
    found = {resource: limits.absolute(resource, parent.of(resource)) for resource in RESOURCES}
    return {resource: float(limit) for resource, limit in found.items() if limit is not None}


def fits(costs: Costs, limits: Mapping[str, float]) -> bool:
    """Whether costs stay within absolute limits."""
    return all(costs.of(resource) <= limit * (1 + TOLERANCE) for resource, limit in limits.items())


def solve(table: OptionTable, limits: Mapping[str, float]) -> Solution:
    """The choice with the lowest total score within absolute limits.

    Raises:
        InfeasibleBudget: no choice meets them; says which limit, and the best that can be reached.
    """
    scores = [[option.score for option in slot.options] for slot in table.slots]
    solution = minimise(table, scores, limits)
    if solution is None:
        raise _infeasible(table, limits)
    return solution


def solve_table(table: Mapping[str, JsonValue], limits: Limits) -> tuple[OptionTable, Solution]:
    """Solve the options of a finished search (`search.json`) once more, under other limits.

    Raises:
        InfeasibleBudget: no choice meets them.
    """
    options = OptionTable.parse({"fixed": table["fixed"], "slots": table["slots"]}, where="search.json")
    return options, solve(options, absolute_limits(limits, options.costs(options.parent_choice)))


def minimise(table: OptionTable, objective: Sequence[Sequence[float]], limits: Mapping[str, float]) -> Solution | None:
    """The choice with the lowest sum of `objective[slot][option]` within limits, or None if there is none.

    Rows and objective are scaled to about 1, so that the solver's absolute tolerances mean the same for bytes and nats.
    """
    scale = max((abs(value) for values in objective for value in values), default=0.0) or 1.0
    highs = _quiet_solver()
    x = [[highs.addBinary(obj=value / scale) for value in values] for values in objective]
    for picks in x:
        highs.addConstr(sum(picks) == 1)
    for resource, limit in limits.items():
        room = limit - table.fixed.of(resource)
        unit = max(abs(room), TOLERANCE)
        used = (
            pick * (option.costs.of(resource) / unit)
            for slot, picks in zip(table.slots, x, strict=True)
            for pick, option in zip(picks, slot.options, strict=True)
        )
        highs.addConstr(sum(used) <= room / unit)
    highs.run()
    status = highs.getModelStatus()
    if status != highspy.HighsModelStatus.kOptimal:
        return None
    values = highs.getSolution().col_value
    choice = tuple(max(range(len(picks)), key=lambda j: values[picks[j].index]) for picks in x)
    info = highs.getInfo()
    return Solution(
        choice=choice,
        objective=sum(values[pick] for values, pick in zip(objective, choice, strict=True)),
        bound=info.mip_dual_bound * scale,
        gap=info.mip_gap,
        status=highs.modelStatusToString(status),
    )


def pareto_front(table: OptionTable, limits: Mapping[str, float], num_points: int) -> list[tuple[float, Solution]]:
    """The best choice at each of several latency limits, under the other limits as they are.

    Returns:
        Latency limit (ms) and solution, from the least latency that the other limits allow to the parent's latency; a
        single limit where that least is not below the parent's.
    """
    others = {resource: limit for resource, limit in limits.items() if resource != "latency_ms"}
    least, most = _least(table, "latency_ms", others), table.costs(table.parent_choice).latency_ms
    if least is None:
        return []
    if least >= most:  # measured: what the other limits leave may be no faster than the parent
        num_points, most = 1, least
    steps = [least + (most - least) * k / max(1, num_points - 1) for k in range(num_points)]
    return [(limit, solve(table, {**others, "latency_ms": limit})) for limit in steps]


def _least(table: OptionTable, resource: str, others: Mapping[str, float]) -> float | None:
    """The least of one resource that a model takes within the other limits, or None if they already rule all out."""
    costs = [[option.costs.of(resource) for option in slot.options] for slot in table.slots]
    solution = minimise(table, costs, others)
    return None if solution is None else table.costs(solution.choice).of(resource)


def _infeasible(table: OptionTable, limits: Mapping[str, float]) -> InfeasibleBudget:
    """Which limit cannot be met, with the best that can be reached; or which clash, where each could be met alone."""
    hint = "offer smaller sub-blocks in search.ffn_fractions and search.num_key_value_heads, or raise search.limits"
    for resource, limit in limits.items():
        least = _least(table, resource, {})
        if least is not None and least > limit * (1 + TOLERANCE):
            message = f"no choice of blocks fits {resource}={limit:.6g}; the smallest reachable is {least:.6g}"
            return InfeasibleBudget(message, hint=f"{hint}.{resource}")
    reach = []
    for resource, limit in limits.items():
        best = _least(table, resource, {other: value for other, value in limits.items() if other != resource})
        if best is not None:
            reach.append(f"{resource}={best:.6g} instead of {limit:.6g}")
    message = "no choice of blocks meets all limits together"
    return InfeasibleBudget(
        f"{message}; each alone could give way: {', or '.join(reach)}" if reach else message, hint=hint
    )


def _quiet_solver() -> highspy.Highs:
    """HiGHS on one thread with a fixed seed and no gap allowed: equal instances give equal answers."""
    with _standard_output_closed():  # its constructor prints a banner that no option turns off
        highs = highspy.Highs()
    settings = {
        "output_flag": False,
        "threads": 1,
        "random_seed": 0,
        "mip_rel_gap": 0.0,
        "mip_abs_gap": 0.0,
        "mip_feasibility_tolerance": TOLERANCE,
        "primal_feasibility_tolerance": TOLERANCE,
    }
    for name, value in settings.items():
        highs.setOptionValue(name, value)
    return highs


@contextlib.contextmanager
def _standard_output_closed() -> Iterator[None]:
    """Send what C code writes to standard output nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
