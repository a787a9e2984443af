"""Branch and bound over Lagrangian bounds, many nodes at a time; the nodes it visits are the proof of optimality.

A node is the set of options that each slot may still have. Subgradient steps (Polyak's) raise its dual bound from the
multipliers of its parent. The node is pruned when the bound reaches the cutoff, the objective of the incumbent.
Otherwise options whose reduced cost lifts the bound to the cutoff are removed, and the node is branched at the slot
whose costs varied most during the subgradient steps. Bounds are computed in floats and trusted only beyond their
rounding error; a bound closer to the cutoff is computed again in integers.

Shape letters: N nodes, K slots (in a node: the free ones), J options of a slot (padded), R limited costs, C children.

Source: M. L. Fisher, 1981; B. T. Polyak, Minimization of unsmooth functionals, 1969.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from components.search.solver.certificate import Allowed, IntegerTable, ProofNode, remaining
from components.search.solver.incumbents import IncumbentPool, Scored, local_search
from components.search.solver.lagrangian_bound import Scaled, best_multipliers
from components.search.solver.problem import Choice, Flags, Floats, Problem

Numbers = NDArray[np.int64]

NUM_STEPS = 6
"""Subgradient steps in a node."""
BATCH_SIZE = 256
"""Nodes at a time, where options are few."""
BATCH_VALUES = 60_000
"""Options of all nodes of a batch: about what the processor's cache holds."""
OVERSHOOT = 1.15
"""A subgradient step aims at this share of the distance to the cutoff: just beyond it, because of rounding."""
RESTART_SHARE = 0.7
"""Restart when a new incumbent leaves at most this share of the options: a smaller tree is searched faster."""
FIRST_NODES = 2_000
"""Nodes after which, without an incumbent, any feasible choice is sought whatever its score."""
LOCAL_SEARCH_BATCHES = 8
"""Local search starts from each of the first so many batches, then from one batch in so many."""
TOLERANCE = 1e-9
"""Choices that exceed a scaled limit by no more than this are checked exactly."""


@dataclass
class Outcome:
    """Result of a search.

    Attributes:
        found: feasible choices and their scores, best first: all that score less than the bound, or a single one.
        bound: no other feasible choice scores less.
        complete: whether the tree was searched to its end; if nothing was found, the problem is infeasible.
        multipliers: of the root, score per unit of cost.
        nodes: the proof, if it was recorded.
    """

    found: list[Scored]
    bound: Fraction
    complete: bool
    multipliers: tuple[float, ...]
    nodes: list[ProofNode] = field(default_factory=list)


def search(
    problem: Problem,
    *,
    mip_start: Sequence[Choice] = (),
    count: int = 1,
    distance: int = 1,
    time_limit_s: float = math.inf,
    max_nodes: int | None = None,
    record: bool = False,
    stop_at_score: Fraction | None = None,
) -> Outcome:
    """Find and prove the best choice, or several that differ.

    Args:
        problem: options and limits.
        mip_start: feasible choices; the first incumbents.
        count: number of choices to find.
        distance: number of slots in which any two of them differ at least.
        time_limit_s: stop after so many seconds.
        max_nodes: stop after so many nodes.
        record: keep the proof; it is complete only if the search begins with the best choice.
        stop_at_score: stop at an incumbent with this score, without a proof.
    """
    deadline = time.monotonic() + time_limit_s
    scaled = Scaled.of(problem)
    incumbents = IncumbentPool(count, distance, _trivial_upper_bound(problem))
    for choice in mip_start:
        incumbents.offer(choice, problem.objective(choice))
    root_R = best_multipliers(scaled)
    first_nodes = FIRST_NODES if problem.names and (max_nodes is None or max_nodes > FIRST_NODES) else max_nodes
    while True:
        tree = _Tree(problem, scaled, root_R, incumbents, record)
        if tree.run(deadline, max_nodes if incumbents.found else first_nodes, stop_at_score):
            continue
        if tree.stopped and not incumbents.found and first_nodes != max_nodes:
            first_nodes = max_nodes
            index = int((root_R * np.abs(scaled.slacks_R)).argmax())
            within = _find_feasible(problem, index, deadline - time.monotonic())
            if not within.found:
                return Outcome([], incumbents.cutoff, within.complete, scaled.in_units(root_R))
            incumbents.offer(within.found[0][0], problem.objective(within.found[0][0]))
        elif tree.stopped or incumbents.cutoff_holds():
            break
    bound, complete = tree.bound()
    return Outcome(incumbents.found, bound, complete, scaled.in_units(root_R), tree.nodes)


def _find_feasible(problem: Problem, index: int, time_limit_s: float) -> Outcome:
    """Find any feasible choice: minimise the cost of one limit under the others, until it is within that limit."""
    others = problem.only([name for number, name in enumerate(problem.names) if number != index])
    slack = problem.slacks[index]
    costs_KJ = problem.costs_KJR[:, :, index]
    outcome = search(others.with_scores(costs_KJ), time_limit_s=time_limit_s, stop_at_score=slack)
    met = [scored for scored in outcome.found if scored[1] <= slack]
    return replace(outcome, found=met, complete=bool(met) or outcome.complete or outcome.bound > slack)


def _trivial_upper_bound(problem: Problem) -> Fraction:
    """A score above that of any choice."""
    highest = float(np.where(problem.allowed_KJ, problem.scores_KJ, -np.inf).max(axis=1).sum())
    margin = (abs(highest) + float(np.abs(problem.scores_KJ).max())) / 1000
    return Fraction(highest) + Fraction(margin or 1)


class _Tree:
    """The open nodes, over the options that reduced-cost fixing at the root leaves."""

    def __init__(
        self, problem: Problem, scaled: Scaled, root_R: Floats, incumbents: IncumbentPool, record: bool
    ) -> None:
        self.problem, self.scaled, self.record = problem, scaled, record
        self.incumbents = incumbents
        self.step = problem.step
        self.nodes: list[ProofNode] = []
        self.num_nodes = self.num_batches = 0
        self.stopped = False
        self.unit = 2.0**-scaled.score_exponent
        priced_KJ = scaled.priced(root_R)
        least_K = priced_KJ.min(axis=1)
        self.reduced_KJ = priced_KJ - least_K[:, None]
        self.root_bound = float(least_K.sum() - root_R @ scaled.slacks_R)
        self.rounding_error = float(scaled.rounding_error(root_R))
        self.root_R = root_R
        if not record:
            self._initial_heuristic()
        self._fix_options()

    def _initial_heuristic(self) -> None:
        """A first incumbent: the choice of the root, made feasible and improved by local search."""
        start = tuple(self.reduced_KJ.argmin(axis=1).tolist())
        found = local_search(self.scaled, self.reduced_KJ, start)
        self._try_incumbent(found)

    def _cutoff(self) -> float:
        """The scaled bound at which a node is pruned: objectives that differ do so by a step at least."""
        less = self.step * (1 - Fraction(1, 2**20)) if self.incumbents.is_full else Fraction(0)
        return float(self.incumbents.cutoff - less) * self.unit

    def _fix_options(self) -> None:
        """Reduced-cost fixing: keep the options that a better choice may have, and of those the undominated ones."""
        gap = self._cutoff() - self.root_bound + 2 * self.rounding_error
        open_KJ = (self.reduced_KJ < gap) & self.scaled.allowed_KJ
        open_KJ[np.arange(len(open_KJ)), self.reduced_KJ.argmin(axis=1)] = True
        self.num_open = int(open_KJ.sum())
        counts_K = open_KJ.sum(axis=1)
        self.slots_K = np.flatnonzero(counts_K > 1)
        self.fixed_slots_K = np.flatnonzero(counts_K == 1)
        self.fixed_options_K = open_KJ[self.fixed_slots_K].argmax(axis=1)
        width = int(counts_K.max())
        order_KJ = np.where(open_KJ, self.reduced_KJ, np.inf).argsort(axis=1, kind="stable")[:, :width]
        self.options_KJ = order_KJ[self.slots_K]
        rows = self.slots_K[:, None]
        self.scores_KJ = self.scaled.scores_KJ[rows, self.options_KJ]
        self.costs_KJR = self.scaled.costs_KJR[rows, self.options_KJ]
        allowed_KJ = open_KJ[rows, self.options_KJ]
        self.base = float(self.scaled.scores_KJ[self.fixed_slots_K, self.fixed_options_K].sum())
        self.slacks_R = self.scaled.slacks_R - self.scaled.costs_KJR[self.fixed_slots_K, self.fixed_options_K].sum(
            axis=0
        )
        if self.incumbents.count == 1 and not self.record:  # a proof speaks of every option
            allowed_KJ &= ~self._dominated(allowed_KJ)
        self.allowed_NKJ = allowed_KJ[None]
        self.multipliers_NR = self.root_R[None].copy()
        self.bounds_N = np.array([self.root_bound])
        self.ids_N = np.array([0])
        if self.record:
            self.nodes = [ProofNode(multipliers=self.scaled.in_units(self.root_R))]
        self.integers: IntegerTable | None = None
        if not len(self.slots_K):
            self._try_incumbent(self._full_choice(np.array([], dtype=np.int64)))
            self.bounds_N = np.array([])

    def _dominated(self, allowed_KJ: Flags) -> Flags:
        """Options that another one equals or beats in score and in every cost; of equal options the first stays."""
        values_KJV = np.concatenate([self.scores_KJ[:, :, None], self.costs_KJR], axis=2)
        values_KJV[~allowed_KJ] = np.inf
        no_worse_KJJ = (values_KJV[:, :, None] <= values_KJV[:, None]).all(axis=3)
        width = no_worse_KJJ.shape[1]
        earlier_JJ = np.arange(width)[:, None] < np.arange(width)
        beats_KJJ = no_worse_KJJ & (earlier_JJ | ~no_worse_KJJ.transpose(0, 2, 1))
        dominated_KJ: Flags = beats_KJJ.any(axis=1)
        return dominated_KJ

    def run(self, deadline: float, max_nodes: int | None, stop_at_score: Fraction | None) -> bool:
        """Search until no node is open or a limit is reached; True asks for a restart with fewer options."""
        while len(self.bounds_N):
            budget_used = time.monotonic() > deadline or (max_nodes is not None and self.num_nodes >= max_nodes)
            reached_score = (
                stop_at_score is not None and self.incumbents.is_full and self.incumbents.cutoff <= stop_at_score
            )
            if budget_used or reached_score:
                self.stopped = True
                return False
            found_better = self._process(self._pop_batch())
            if found_better and not self.record:
                left = int((self.reduced_KJ < self._cutoff() - self.root_bound + 2 * self.rounding_error).sum())
                if left <= RESTART_SHARE * self.num_open:
                    return True
        return False

    def bound(self) -> tuple[Fraction, bool]:
        """The proven bound, and whether the search is complete."""
        if not len(self.bounds_N):
            return self.incumbents.lowest_cutoff, True
        errors_N = self.scaled.rounding_error(self.multipliers_NR)
        lowest = float(np.min(self.bounds_N - errors_N))
        lowest = max(lowest, self.root_bound - self.rounding_error)
        return min(Fraction(math.ldexp(lowest, self.scaled.score_exponent)), self.incumbents.lowest_cutoff), False

    def _pop_batch(self) -> "_Batch":
        """Remove the newest nodes, best siblings first: depth first finds incumbents early and needs little memory."""
        size = int(np.clip(BATCH_VALUES // max(1, self.scores_KJ.size), 8, BATCH_SIZE))
        batch = _Batch(self.allowed_NKJ[-size:], self.multipliers_NR[-size:], self.bounds_N[-size:], self.ids_N[-size:])
        self.allowed_NKJ, self.multipliers_NR = self.allowed_NKJ[:-size], self.multipliers_NR[:-size]
        self.bounds_N, self.ids_N = self.bounds_N[:-size], self.ids_N[:-size]
        return batch

    def _process(self, batch: "_Batch") -> bool:
        """Bound, prune and branch some nodes; returns whether the cutoff fell."""
        before = self.incumbents.cutoff
        self.num_nodes += len(batch.bounds_N)
        self.num_batches += 1
        picked_NKJ = self._raise_bounds(batch)
        if self.record and self.num_batches == 1 and not self._root_is_pruned(batch.multipliers_NR[0]):
            # The check of the proof removes options by the multipliers recorded for the root: record those used here.
            batch.multipliers_NR[0], batch.bounds_N[0] = self.root_R, self.root_bound
        cutoff = self._cutoff()
        open_N = ~self._pruned(batch, cutoff)
        self._record_leaf(batch, ~open_N)
        batch, picked_NKJ = batch.where(open_N), picked_NKJ[open_N]
        if len(batch.bounds_N):
            self._branch(batch, picked_NKJ, cutoff)
        return self.incumbents.cutoff < before

    def _raise_bounds(self, batch: "_Batch") -> Floats:
        """Raise bounds by subgradient steps. Returns how often each option was best, later steps weigh more."""
        num_nodes = len(batch.bounds_N)
        slots_K = np.arange(len(self.slots_K))
        here_NR = batch.multipliers_NR.copy()
        batch.bounds_N = np.full(num_nodes, -np.inf)
        picked_NKJ = np.zeros(batch.allowed_NKJ.shape)
        active_N = np.arange(num_nodes)
        stride_N = np.ones(num_nodes)
        nearest: tuple[float, Numbers] | None = None
        cutoff = self._cutoff()
        for step in range(NUM_STEPS):
            at_NR = here_NR[active_N]
            priced_NKJ = self._priced(at_NR, batch.allowed_NKJ[active_N])
            picks_NK = priced_NKJ.argmin(axis=2)
            bounds_N = priced_NKJ.min(axis=2).sum(axis=1) + self.base - at_NR @ self.slacks_R
            excess_NR = self.costs_KJR[slots_K, picks_NK].sum(axis=1) - self.slacks_R
            rises_N = bounds_N > batch.bounds_N[active_N]
            risen_N = active_N[rises_N]
            batch.bounds_N[risen_N], batch.multipliers_NR[risen_N] = bounds_N[rises_N], at_NR[rises_N]
            stride_N[active_N[~rises_N]] *= 0.7
            picked_NKJ[active_N[:, None], slots_K, picks_NK] += step + 1
            if not self.record:
                scores_N = self.scores_KJ[slots_K, picks_NK].sum(axis=1) + self.base
                total_excess_N = np.maximum(excess_NR, 0.0).sum(axis=1)
                feasible_N = np.flatnonzero((total_excess_N <= TOLERANCE) & (scores_N < cutoff))
                for index in feasible_N[scores_N[feasible_N].argsort(kind="stable")[: self.incumbents.count]]:
                    self._try_incumbent(self._full_choice(picks_NK[index]))
                cutoff = self._cutoff()
                near = int(total_excess_N.argmin())
                if nearest is None or total_excess_N[near] < nearest[0]:
                    nearest = float(total_excess_N[near]), picks_NK[near]
            slope_NR = np.where((at_NR <= 0) & (excess_NR < 0), 0.0, excess_NR)
            length_N = (slope_NR**2).sum(axis=1)
            lift_N = OVERSHOOT * (cutoff - bounds_N) + 8 * self.scaled.rounding_error(at_NR)
            stride = np.where(length_N > 0, lift_N / np.maximum(length_N, 1e-300), 0.0)
            here_NR[active_N] = np.maximum(0.0, at_NR + (stride * stride_N[active_N])[:, None] * slope_NR)
            active_N = active_N[(batch.bounds_N[active_N] < cutoff) & (length_N > 0)]
            if not len(active_N):
                break
        if nearest is not None and (
            self.num_batches <= LOCAL_SEARCH_BATCHES or self.num_batches % LOCAL_SEARCH_BATCHES == 0
        ):
            self._try_incumbent(local_search(self.scaled, self.reduced_KJ, self._full_choice(nearest[1])))
        return picked_NKJ

    def _priced(self, multipliers_NR: Floats, allowed_NKJ: Flags) -> Floats:
        """Score and priced costs of the options of nodes; infinite for removed options."""
        priced_NM = multipliers_NR @ self.costs_KJR.reshape(self.scores_KJ.size, len(self.slacks_R)).T
        priced_NKJ: Floats = priced_NM.reshape(allowed_NKJ.shape)
        priced_NKJ += self.scores_KJ
        np.copyto(priced_NKJ, np.inf, where=~allowed_NKJ)
        return priced_NKJ

    def _pruned(self, batch: "_Batch", cutoff: float) -> Flags:
        """Which nodes can be pruned; those within the rounding error of the cutoff are decided in integers."""
        errors_N = self.scaled.rounding_error(batch.multipliers_NR)
        pruned_N: Flags = batch.bounds_N - errors_N >= cutoff
        if self.incumbents.is_full:
            for index in np.flatnonzero(~pruned_N & (batch.bounds_N + errors_N >= cutoff)):
                pruned_N[index] = self._is_pruned_exactly(batch.allowed_NKJ[index], batch.multipliers_NR[index])
        return pruned_N

    def _root_is_pruned(self, multipliers_R: Floats) -> bool:
        """Whether these multipliers prune the root with all its options."""
        costs = [self.problem.costs_KJR[:, :, index].tolist() for index in range(len(self.problem.slacks))]
        integers = IntegerTable(self.problem.scores_KJ.tolist(), costs, self.problem.slacks)
        allowed: Allowed = [np.flatnonzero(allowed_J).tolist() for allowed_J in self.problem.allowed_KJ]
        return (
            remaining(integers, allowed, self.scaled.in_units(multipliers_R), self.incumbents.cutoff, self.step) is None
        )

    def _is_pruned_exactly(self, allowed_KJ: Flags, multipliers_R: Floats) -> bool:
        """Whether a node can be pruned, in integers."""
        if self.integers is None:
            self.integers = self._integers()
        decided: Allowed = [[0] for _ in self.fixed_slots_K]
        allowed = [np.flatnonzero(allowed_J).tolist() for allowed_J in allowed_KJ]
        multipliers = self.scaled.in_units(multipliers_R)
        return remaining(self.integers, decided + allowed, multipliers, self.incumbents.cutoff, self.step) is None

    def _integers(self) -> IntegerTable:
        """The table in integers: the fixed slots with their option, then the free ones with theirs."""
        problem = self.problem

        def rows(values_KJ: Floats) -> list[list[float]]:
            decided: list[float] = values_KJ[self.fixed_slots_K, self.fixed_options_K].tolist()
            undecided: list[list[float]] = values_KJ[self.slots_K[:, None], self.options_KJ].tolist()
            return [[value] for value in decided] + undecided

        costs = [rows(problem.costs_KJR[:, :, index]) for index in range(len(problem.limits))]
        return IntegerTable(rows(problem.scores_KJ), costs, problem.slacks)

    def _branch(self, batch: "_Batch", picked_NKJ: Floats, cutoff: float) -> None:
        """Remove options by reduced cost, and replace nodes by their children."""
        num_nodes = len(batch.bounds_N)
        priced_NKJ = self._priced(batch.multipliers_NR, batch.allowed_NKJ)
        reached_NKJ = priced_NKJ - priced_NKJ.min(axis=2, keepdims=True) + batch.bounds_N[:, None, None]
        errors_N = self.scaled.rounding_error(batch.multipliers_NR)
        allowed_NKJ = batch.allowed_NKJ & (reached_NKJ - 2 * errors_N[:, None, None] < cutoff)
        counts_NK = allowed_NKJ.sum(axis=2)
        picked_NKJ = np.where(allowed_NKJ, picked_NKJ, 0.0)
        slots_N = np.where(counts_NK > 1, 1e-9 + self._branching_scores(batch, picked_NKJ), 0.0).argmax(axis=1)
        nodes_N = np.arange(num_nodes)
        empty_N = (counts_NK == 0).any(axis=1)
        leaf_N = empty_N | (counts_NK[nodes_N, slots_N] == 1)
        for index in np.flatnonzero(leaf_N & ~empty_N):
            self._try_incumbent(self._full_choice(allowed_NKJ[index].argmax(axis=1)))
        self._record_leaf(batch, leaf_N)
        parents_C, options_C = np.nonzero(allowed_NKJ[nodes_N, slots_N] & ~leaf_N[:, None])
        slots_C = slots_N[parents_C]
        children_CKJ = allowed_NKJ[parents_C]
        rows_C = np.arange(len(parents_C))
        children_CKJ[rows_C, slots_C] = False
        children_CKJ[rows_C, slots_C, options_C] = True
        bounds_C = reached_NKJ[parents_C, slots_C, options_C]
        ids_C = self._record_children(batch, parents_C, slots_C, options_C)
        order_C = np.argsort(-bounds_C, kind="stable")
        self.allowed_NKJ = np.concatenate([self.allowed_NKJ, children_CKJ[order_C]])
        self.multipliers_NR = np.concatenate([self.multipliers_NR, batch.multipliers_NR[parents_C][order_C]])
        self.bounds_N = np.concatenate([self.bounds_N, bounds_C[order_C]])
        self.ids_N = np.concatenate([self.ids_N, ids_C[order_C]])

    def _branching_scores(self, batch: "_Batch", picked_NKJ: Floats) -> Floats:
        """Branching score of each slot: variance of its priced costs over the subgradient steps."""
        shares_NKJ = picked_NKJ / np.maximum(picked_NKJ.sum(axis=2, keepdims=True), 1e-9)
        scores_NK = np.zeros(shares_NKJ.shape[:2])
        for costs_KJ, prices_N in zip(np.moveaxis(self.costs_KJR, 2, 0), batch.multipliers_NR.T, strict=True):
            variance_NK = (shares_NKJ * costs_KJ**2).sum(axis=2) - (shares_NKJ * costs_KJ).sum(axis=2) ** 2
            scores_NK += np.maximum(variance_NK, 0.0) * prices_N[:, None] ** 2
        return scores_NK

    def _record_leaf(self, batch: "_Batch", which_N: Flags) -> None:
        """Record leaves of the proof."""
        if self.record:
            for index in np.flatnonzero(which_N):
                multipliers = self.scaled.in_units(batch.multipliers_NR[index])
                self.nodes[batch.ids_N[index]] = ProofNode(multipliers=multipliers)

    def _record_children(self, batch: "_Batch", parents_C: Numbers, slots_C: Numbers, options_C: Numbers) -> Numbers:
        """Record branched nodes, and number their children."""
        if not self.record:
            return np.zeros(len(parents_C), dtype=np.int64)
        ids_C = len(self.nodes) + np.arange(len(parents_C))
        children: dict[int, dict[int, int]] = {}
        for parent, slot, option, number in zip(parents_C, slots_C, options_C, ids_C.tolist(), strict=True):
            children.setdefault(int(parent), {})[int(self.options_KJ[slot, option])] = number
        slot_of = dict(zip(parents_C.tolist(), slots_C.tolist(), strict=True))
        self.nodes += [ProofNode(multipliers=())] * len(ids_C)
        for parent, numbers in children.items():
            self.nodes[batch.ids_N[parent]] = ProofNode(
                multipliers=self.scaled.in_units(batch.multipliers_NR[parent]),
                slot=int(self.slots_K[slot_of[parent]]),
                children=numbers,
            )
        return ids_C

    def _full_choice(self, picks_K: Numbers) -> Choice:
        """The choice for all slots from the options of the free ones."""
        choice_K = np.zeros(len(self.problem.scores_KJ), dtype=np.int64)
        choice_K[self.fixed_slots_K] = self.fixed_options_K
        choice_K[self.slots_K] = self.options_KJ[np.arange(len(self.slots_K)), picks_K]
        return tuple(choice_K.tolist())

    def _try_incumbent(self, choice: Choice) -> None:
        """Add a choice to the incumbents if it is feasible and below the cutoff; decided exactly."""
        slots_K = np.arange(len(choice))
        score = self.scaled.scores_KJ[slots_K, choice].sum()
        excess_R = self.scaled.costs_KJR[slots_K, choice].sum(axis=0) - self.scaled.slacks_R
        if score > float(self.incumbents.cutoff) * self.unit + TOLERANCE or (excess_R > TOLERANCE).any():
            return  # infeasible or above the cutoff by more than rounding errors
        objective = self.problem.objective(choice)
        if objective < self.incumbents.cutoff and ((excess_R < -TOLERANCE).all() or self.problem.fits(choice)):
            self.incumbents.offer(choice, objective)


@dataclass
class _Batch:
    """Nodes that are processed together."""

    allowed_NKJ: Flags
    multipliers_NR: Floats
    bounds_N: Floats
    ids_N: Numbers

    def where(self, which_N: Flags) -> "_Batch":
        """The nodes of a mask."""
        return _Batch(
            self.allowed_NKJ[which_N], self.multipliers_NR[which_N], self.bounds_N[which_N], self.ids_N[which_N]
        )
