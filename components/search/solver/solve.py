"""Entry points of the solver: best choice, pool of diverse choices, certificate, and conflict of infeasible limits.

Source: arXiv 2411.19146, appendix B.
"""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pydantic import JsonValue

from components.core.base.errors import InfeasibleBudget, RecipeError, TesseraError
from components.search.config import Limits
from components.search.costs.resources import RESOURCES, Costs
from components.search.solver.branch_and_bound import Outcome, search
from components.search.solver.certificate import Certificate, IntegerTable, ProofNode, relative_gap
from components.search.solver.incumbents import far_apart
from components.search.solver.option_table import OptionTable
from components.search.solver.problem import ROUNDING, Choice, Problem

MAX_PROOF_NODES = 20_000
"""A larger proof is not recorded: the certificate then has the root's bound, and the gap to it."""

MAX_NODES = 1_000_000
"""Nodes after which a search stops without a proof, some minutes: counted in nodes, so results are reproducible."""

CLOSE = 2
"""Up to this distance one search collects all choices that may be in the pool; beyond, they would be too many."""

Status = Literal["optimal", "feasible"]


class TimeIsOver(TesseraError):
    """No choice within the limits was found in time, nor a proof that there is none."""


@dataclass(frozen=True)
class Solution:
    """A choice, and how good it is proven to be.

    Attributes:
        choice: option number of each slot.
        objective: sum of the scores.
        bound: no choice within the limits scores below this.
        gap: relative distance of the two; 0 is a proof.
        status: `optimal`, or `feasible` where the search stopped before the proof was complete.
    """

    choice: Choice
    objective: float
    bound: float
    gap: float
    status: Status


def solve_problem(
    problem: Problem,
    *,
    time_limit_s: float = math.inf,
    max_nodes: int | None = None,
    mip_start: Sequence[Choice] = (),
) -> Solution | None:
    """The choice with the lowest sum of scores within the limits, or None if there is none.

    Args:
        problem: options and limits.
        time_limit_s: after so many seconds the best choice so far is returned with its gap.
        max_nodes: the same after so many nodes.
        mip_start: feasible choices; the first incumbents.

    Raises:
        TimeIsOver: nothing was found in time, nor a proof that nothing is within the limits.
    """
    solutions = solutions_of(search(problem, mip_start=mip_start, time_limit_s=time_limit_s, max_nodes=max_nodes))
    return solutions[0] if solutions else None


def solutions_of(outcome: Outcome) -> list[Solution]:
    """What a search found, best first.

    Raises:
        TimeIsOver: it found nothing, and did not come to its end.
    """
    if not outcome.found and not outcome.complete:
        raise TimeIsOver(
            "time was over before any choice within the limits was found, or a proof that there is none",
            hint="allow more time, or raise a limit",
        )
    return [_solution(choice, objective, min(objective, outcome.bound)) for choice, objective in outcome.found]


def _solution(choice: Choice, objective: Fraction, bound: Fraction) -> Solution:
    return Solution(
        choice=choice,
        objective=float(objective),
        bound=float(bound),
        gap=float(relative_gap(objective, bound)),
        status="optimal" if bound == objective else "feasible",
    )


def pool(problem: Problem, count: int, *, distance: int = 1, time_limit_s: float = math.inf) -> list[Solution]:
    """The best choices, best first.

    Args:
        problem: options and limits.
        count: how many; fewer come back where there are no more, or time is over.
        distance: slots in which any two differ at least; 1 gives the `count` best.
        time_limit_s: for all of them.

    Raises:
        TimeIsOver: not even one was found.

    Source: arXiv 2411.19146, appendix B (there at most a share alpha of the layers may agree).
    """
    deadline = time.monotonic() + time_limit_s
    rough = _one_by_one(problem, count, distance, deadline, None if distance > CLOSE else 1)
    if distance > CLOSE:
        return rough
    mip_start = [solution.choice for solution in rough]
    time_left_s = deadline - time.monotonic()
    outcome = search(problem, mip_start=mip_start, count=count, distance=distance, time_limit_s=time_left_s)
    outcome.found = far_apart(outcome.found, count, distance)
    return solutions_of(outcome)


def _one_by_one(problem: Problem, count: int, distance: int, deadline: float, max_nodes: int | None) -> list[Solution]:
    """Solve repeatedly with a no-good cut for each earlier choice; with few nodes the choices are good, not best."""
    found: list[Solution] = []
    while len(found) < count:
        outcome = search(problem, time_limit_s=deadline - time.monotonic(), max_nodes=max_nodes if found else None)
        if not outcome.found:
            if not found:
                return solutions_of(outcome)
            break
        found += solutions_of(outcome)
        problem = problem.with_no_good_cut(found[-1].choice, distance)
    return found


def certify(
    problem: Problem, choice: Choice, *, fixed: Mapping[int, int] | None = None, max_nodes: int = MAX_PROOF_NODES
) -> Certificate:
    """The proof that no feasible choice scores less; if it is too large, the bound of the root and the gap to it.

    Args:
        problem: options and limits, with nothing fixed.
        choice: the best one.
        fixed: option of each slot whose option is fixed.
        max_nodes: the largest proof to record.
    """
    fixed = dict(fixed or {})
    restricted = problem.with_fixed(fixed)
    outcome = search(restricted, mip_start=[choice], max_nodes=max_nodes, record=True)
    objective = problem.objective(choice)
    proven = outcome.complete and outcome.found[0][0] == choice
    return Certificate(
        limits={name: float(limit) for name, limit in zip(problem.names, problem.limits, strict=True)},
        fixed=fixed,
        choice=choice,
        objective=str(objective),
        bound=str(objective if proven else min(objective, _root_bound(restricted, outcome))),
        nodes=tuple(outcome.nodes) if proven else (ProofNode(multipliers=outcome.multipliers),),
    )


def _root_bound(problem: Problem, outcome: Outcome) -> Fraction:
    """The Lagrangian of the root, exact."""
    costs = [problem.costs_KJR[:, :, index].tolist() for index in range(len(problem.limits))]
    integers = IntegerTable(problem.scores_KJ.tolist(), costs, problem.slacks)
    allowed = [row.nonzero()[0].tolist() for row in problem.allowed_KJ]
    return integers.reduced(allowed, outcome.multipliers)[0]


def absolute_limits(limits: Limits, parent: Costs, batch_tokens: int = 0) -> dict[str, float]:
    """The limits that are set, as numbers; shares are taken of the parent's cost.

    Args:
        limits: as the recipe has them.
        parent: what the parent takes.
        batch_tokens: new tokens of the batch that times are of: throughput is a limit on its time.

    Raises:
        RecipeError: a limit on a cost that is not known.
    """
    found = {resource: limits.absolute(resource, parent.of(resource)) for resource in RESOURCES}
    wanted = {resource: float(limit) for resource, limit in found.items() if limit is not None}
    asked = {resource: resource for resource in wanted}
    if limits.tokens_per_s is not None:
        asked["request_ms"] = "tokens_per_s"
    for resource, name in asked.items():
        if parent.of(resource) == 0 or (name == "tokens_per_s" and not batch_tokens):
            raise RecipeError(
                f"search.limits.{name} is set, and the given costs do not have it",
                hint="leave search.costs out to measure again, or set another limit",
            )
    budget = limits.request_budget_ms(parent.request_ms, batch_tokens)
    if budget is not None:
        wanted["request_ms"] = min(budget, wanted.get("request_ms", budget))
    return wanted


def fits(costs: Costs, limits: Mapping[str, float]) -> bool:
    """Whether costs stay within absolute limits."""
    return all(costs.of(resource) <= limit + abs(limit) * float(ROUNDING) for resource, limit in limits.items())


def solve(table: OptionTable, limits: Mapping[str, float]) -> Solution:
    """The choice with the lowest total score within absolute limits.

    Raises:
        InfeasibleBudget: no choice meets them; says which limits clash, and the best that can be reached.
    """
    solution = minimise(table, table.scores, limits)
    if solution is None:
        raise _infeasible(table, limits)
    return solution


def solve_table(table: Mapping[str, JsonValue], limits: Limits) -> tuple[OptionTable, Solution]:
    """Solve the options of a finished search (`search.json`) once more, under other limits.

    Raises:
        InfeasibleBudget: no choice meets them.
    """
    mip_start = {name: table[name] for name in OptionTable.model_fields if name in table}
    options = OptionTable.parse(mip_start, where="search.json")
    return options, solve(options, absolute_limits(limits, options.costs(options.parent_choice), options.batch_tokens))


def minimise(table: OptionTable, objective: Sequence[Sequence[float]], limits: Mapping[str, float]) -> Solution | None:
    """The choice with the lowest sum of `objective[slot][option]` within limits, or None if there is none."""
    return solve_problem(table.problem(objective, limits), max_nodes=MAX_NODES)


def _infeasible(table: OptionTable, limits: Mapping[str, float]) -> InfeasibleBudget:
    """Which limits cannot be met together, with the best that can be reached of each."""
    hint = "offer smaller sub-blocks in search.ffn_fractions and search.num_key_value_heads, or raise search.limits"
    best = find_conflict(table.problem(table.scores, limits))
    if len(best) == 1:
        ((resource, least),) = best.items()
        message = f"no choice of blocks fits {resource}={limits[resource]:.6g}; the smallest reachable is {least:.6g}"
        return InfeasibleBudget(message, hint=f"{hint}.{resource}")
    if not best:
        return InfeasibleBudget("no choice of blocks meets all limits together", hint=hint)
    reach = ", ".join(f"{resource}={least:.6g} instead of {limits[resource]:.6g}" for resource, least in best.items())
    return InfeasibleBudget(
        f"no choice of blocks meets all limits together; each alone could give way: {reach}", hint=hint
    )


TIME_LIMIT_S = 20.0
"""Seconds for each question whether some limits can be met together."""


def find_conflict(problem: Problem, *, time_limit_s: float = TIME_LIMIT_S) -> dict[str, float]:
    """The smallest set of limits that no choice meets together.

    Sets are tried by size; of sets of one size the first in the order of the limits counts.

    Args:
        problem: an infeasible one.
        time_limit_s: for each set of limits; a set that is not decided in time is skipped.

    Returns:
        For each limit of the set the lowest cost that was reached while the others of the set are met; empty if no
        set was decided in time.
    """
    for size in range(1, len(problem.names) + 1):
        for names in itertools.combinations(problem.names, size):
            first = _least(problem, names[0], names, time_limit_s)
            if first.bound > problem.slacks[problem.names.index(names[0])]:
                outcomes = {name: _least(problem, name, names, time_limit_s) for name in names}
                fixed = dict(zip(problem.names, problem.fixed, strict=True))
                return {name: float(it.found[0][1] + fixed[name]) for name, it in outcomes.items() if it.found}
    return {}


def _least(problem: Problem, name: str, names: tuple[str, ...], time_limit_s: float) -> Outcome:
    """The lowest sum of one cost over the slots while the others of a set are met."""
    index = problem.names.index(name)
    others = problem.only([other for other in names if other != name]).with_scores(problem.costs_KJR[:, :, index])
    return search(others, time_limit_s=time_limit_s)
