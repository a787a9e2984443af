"""Latency feedback: children are measured, and costs corrected, until predicted and measured times agree.

The search assumes that times of sub-blocks add up. So the chosen child is assembled and measured in vLLM, in turns with
the parent: a busy machine slows both. If the prediction was wrong, the costs of the sub-blocks are changed by the
smallest shares that explain all measured children, while the parent's sum stays, and the problem is solved again.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from components.core.runtime.placement import Placement
from components.core.serving.engine import BatchTime
from components.core.serving.load_profile import LoadProfile
from components.core.serving.timing import SILENT, TimingReport, measure_times
from components.search.config import LatencyFeedback
from components.search.costs.resources import TIMES, Costs
from components.search.search_table import FeedbackRound
from components.search.solver.option_table import OptionTable
from components.search.solver.problem import Choice
from components.search.solver.solve import Solution, solve

LEAST_LEFT = 0.1
"""A correction leaves at least this share of a cost."""
PARENT_WEIGHT = 1000.0
"""Weight of the parent's time in the least squares that correct the costs: limits are shares of it."""
SOLVED_FOR = ("latency_ms", "time_to_first_token_ms")
"""Times that are measured; the third, of whole requests, follows from them."""


@dataclass(frozen=True)
class MeasuredChild:
    """Times of a child and of its parent, medians of measurements in turns.

    Attributes:
        parent: times of the parent.
        child: times of the child.
        spread: largest less least of the child's decode steps, as a share of their median.
    """

    parent: Costs
    child: Costs
    spread: float


@dataclass(frozen=True)
class FeedbackResult:
    """Result of the latency feedback.

    Attributes:
        table: the options with corrected costs.
        solution: the best choice by those.
        rounds: the children that were measured.
    """

    table: OptionTable
    solution: Solution
    rounds: tuple[FeedbackRound, ...]


def calibrate_latency(
    table: OptionTable,
    limits: Mapping[str, float],
    measure: Callable[[Choice], MeasuredChild],
    loop: LatencyFeedback,
    new_tokens: int,
) -> FeedbackResult:
    """Solve, measure, correct, until the predicted time of the best choice is right or the rounds are used up.

    Args:
        table: options with uncorrected costs.
        limits: absolute.
        measure: assembles the child of a choice, and measures it in turns with the parent.
        loop: number of rounds, and the tolerance.
        new_tokens: of a request of the measured batch.

    Raises:
        InfeasibleBudget: with the corrected costs no choice is within the limits.
    """
    corrected, solution = table, solve(table, limits)
    times = [name for name in TIMES if name in limits] or ["latency_ms"]
    parent = table.costs(table.parent_choice)
    found: dict[Choice, Costs] = {}
    rounds: list[FeedbackRound] = []
    pace = spread = 1.0
    for _ in range(loop.max_rounds):
        again = solution.choice in found
        if not again:
            measured = measure(solution.choice)
            pace, spread = measured.parent.latency_ms / parent.latency_ms, measured.spread
            found[solution.choice] = _without_drift(parent, measured, new_tokens)
        predicted, true = corrected.costs(solution.choice), found[solution.choice]
        error = max(abs(predicted.of(name) / true.of(name) - 1) for name in times)
        rounds.append(
            FeedbackRound(
                choice=solution.choice,
                score=solution.objective,
                predicted={name: predicted.of(name) for name in TIMES},
                measured={name: true.of(name) for name in TIMES},
                pace=pace,
                spread=spread,
                error=error,
                agreed=error <= loop.tolerance,
            )
        )
        if again or error <= loop.tolerance:
            break
        corrected = correct(table, found, new_tokens)
        solution = solve(corrected, limits)
    return FeedbackResult(corrected, solution, tuple(rounds))


def measure_child(
    parent: Path, child: Path, deployment: LoadProfile, placement: Placement, report: TimingReport = SILENT
) -> MeasuredChild:
    """Measure a child and its parent in vLLM, in turns.

    Raises:
        MissingPackage: vLLM is not installed.
        StageFailed: vLLM could not run one of the two.
    """
    new_tokens = deployment.new_tokens
    threads, memory_gib = placement.engine_threads, placement.memory_gib
    both = measure_times([parent, child], deployment, threads, memory_gib, report=report)
    steps = [time.step_ms for time in both[1]]
    spread = (max(steps) - min(steps)) / statistics.median(steps)
    return MeasuredChild(_medians(both[0], new_tokens), _medians(both[1], new_tokens), spread)


def correct(table: OptionTable, measured: Mapping[Choice, Costs], new_tokens: int) -> OptionTable:
    """The options with times that add up to the measured times of these choices, and to the parent's former time.

    Of all such times those are taken whose relative changes have the smallest sum of squares.
    """
    targets = {table.parent_choice: table.costs(table.parent_choice), **measured}
    choices, counts_ON, names = list(targets), _counts(table, list(targets)), _names(table)
    new = {
        resource: _smallest_change(
            counts_ON, _times(table, names, resource), [targets[choice].of(resource) for choice in choices]
        )
        for resource in SOLVED_FOR
    }

    def timed(costs: Costs, name: str) -> Costs:
        place = names.index(name)
        latency, prefill = (float(new[resource][place]) for resource in SOLVED_FOR)
        return costs.timed(latency_ms=latency, time_to_first_token_ms=prefill, new_tokens=new_tokens)

    priced = table.priced(lambda option: timed(option.costs, option.name))
    return priced.model_copy(update={"fixed": timed(table.fixed, FIXED)})


FIXED = ""
"""Name of the fixed part among those of variants."""


def _names(table: OptionTable) -> list[str]:
    """Names of the fixed part and of all variants."""
    return [FIXED, *sorted({option.name for slot in table.slots for option in slot.options})]


def _counts(table: OptionTable, choices: Sequence[Choice]) -> NDArray[np.float64]:
    """Number of occurrences of the fixed part and of each variant in each choice."""
    names = _names(table)
    chosen = [[slot.options[pick].name for slot, pick in zip(table.slots, choice, strict=True)] for choice in choices]
    return np.array([[1.0 if name == FIXED else row.count(name) for name in names] for row in chosen])


def _times(table: OptionTable, names: Sequence[str], resource: str) -> NDArray[np.float64]:
    """Time of the fixed part and of each variant; a variant takes the same time in every layer."""
    each = {option.name: option.costs.of(resource) for slot in table.slots for option in slot.options}
    return np.array([table.fixed.of(resource) if name == FIXED else each[name] for name in names])


def _smallest_change(
    counts_ON: NDArray[np.float64], times_N: NDArray[np.float64], targets: Sequence[float]
) -> NDArray[np.float64]:
    """Times whose sums are the targets, with the smallest relative changes.

    Where noise makes the targets contradict each other, the first one, the parent's, wins: limits are shares of it.
    """
    target_O = np.array(targets)
    if not target_O.all():  # costs from elsewhere may not know this time
        return times_N
    weight_O = np.where(np.arange(len(target_O)) == 0, PARENT_WEIGHT, 1.0)
    shares_ON = weight_O[:, None] * counts_ON * times_N / target_O[:, None]
    factor_N, free_N = np.ones(len(times_N)), np.ones(len(times_N), dtype=bool)
    while free_N.any():
        error_O = weight_O - shares_ON @ np.where(free_N, 1.0, factor_N)
        factor_N[free_N] = 1 + np.linalg.lstsq(shares_ON[:, free_N], error_O, rcond=None)[0]
        low_N = free_N & (factor_N < LEAST_LEFT)
        if not low_N.any():
            break
        factor_N[low_N] = LEAST_LEFT
        free_N &= ~low_N
    return np.asarray(times_N * factor_N)


def _without_drift(parent: Costs, measured: MeasuredChild, new_tokens: int) -> Costs:
    """The child's times, divided by the drift of the parent's time since the costs were measured."""
    latency, prefill = (
        measured.child.of(resource) * parent.of(resource) / measured.parent.of(resource) for resource in SOLVED_FOR
    )
    return Costs().timed(latency_ms=latency, time_to_first_token_ms=prefill, new_tokens=new_tokens)


def _medians(times: Sequence[BatchTime], new_tokens: int) -> Costs:
    return Costs().timed(
        latency_ms=statistics.median(time.step_ms for time in times),
        time_to_first_token_ms=statistics.median(time.first_token_ms for time in times),
        new_tokens=new_tokens,
    )
