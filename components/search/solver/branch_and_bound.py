"""Branch and bound over Lagrangian bounds, many nodes at a time; what it visits is the proof that its answer is best.

A node is a set of options that each slot may still hold. Its multipliers begin as its parent's and climb towards the
best known objective (Polyak's step); once the Lagrangian gets there, no choice in the node is better. Otherwise options
whose reduced cost would lift the bound so far are crossed out, and the node is split at the slot whose costs changed
most while the multipliers moved. Bounds are computed in floats and trusted only beyond their doubt; what lies
within it is computed again in whole numbers.

Shape letters: N nodes, K slots that are not decided, J options of a slot (padded), R limited costs.

Source: M. L. Fisher, 1981; B. T. Polyak, Minimization of unsmooth functionals, 1969.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from components.search.solver.certificate import Allowed, ProofNode, WholeNumbers, remaining
from components.search.solver.incumbents import IncumbentPool, Scored, improve
from components.search.solver.lagrangian_bound import Scaled, best_multipliers
from components.search.solver.problem import Choice, Flags, Floats, Problem

Numbers = NDArray[np.int64]

NUM_STEPS = 6
"""Steps that multipliers climb in a node."""
BATCH_SIZE = 256
"""Nodes at a time, where options are few."""
BATCH_VALUES = 60_000
"""Options of all nodes of a batch: about what the processor's cache holds."""
OVERSHOOT = 1.15
"""Share of the way to the goal that a step aims at: just beyond, where floats are trusted."""
SHRINK = 0.7
"""When a better choice leaves this share of the options or less, the tree is begun anew: smaller, it grows faster."""
FEW_NODES = 2_000
"""Nodes after which, with no choice within the limits found, one is sought whatever it scores."""
IMPROVED = 8
"""Batches from whose nearest choice a better one is sought: so many, then one in so many."""
NEAR = 1e-9
"""Choices that exceed a scaled limit by no more are looked at exactly."""


@dataclass
class Outcome:
    """What a search came to.

    Attributes:
        found: choices within the limits and what they score, best first: all that score less than the bound, unless a
            single one was asked for.
        bound: no choice within the limits that was not found scores less.
        complete: whether the search came to its end; with nothing found, that there is no choice.
        multipliers: of the root, scores a unit of cost.
        nodes: the proof, where it was recorded.
    """

    found: list[Scored]
    bound: Fraction
    complete: bool
    multipliers: tuple[float, ...]
    nodes: list[ProofNode] = field(default_factory=list)


def search(
    problem: Problem,
    *,
    known: Sequence[Choice] = (),
    count: int = 1,
    distance: int = 1,
    time_limit_s: float = math.inf,
    max_nodes: int | None = None,
    record: bool = False,
    good_enough: Fraction | None = None,
) -> Outcome:
    """Find the best choice and prove it, or several that differ.

    Args:
        problem: what to choose from.
        known: choices within the limits, to begin with.
        count: how many choices are wanted.
        distance: slots in which they have to differ.
        time_limit_s: when to stop, seconds.
        max_nodes: when to stop, nodes of the tree.
        record: keep the proof; only a search that begins with the best choice proves it in one piece.
        good_enough: a score to stop at, without a proof.
    """
    deadline = time.monotonic() + time_limit_s
    scaled = Scaled.of(problem)
    kept = IncumbentPool(count, distance, _ceiling(problem))
    for choice in known:
        kept.offer(choice, problem.objective(choice))
    root_R = best_multipliers(scaled)
    few_nodes = FEW_NODES if problem.names and (max_nodes is None or max_nodes > FEW_NODES) else max_nodes
    while True:
        tree = _Tree(problem, scaled, root_R, kept, record)
        if tree.grow(deadline, max_nodes if kept.found else few_nodes, good_enough):
            continue
        if tree.stopped and not kept.found and few_nodes != max_nodes:
            few_nodes = max_nodes
            index = int((root_R * np.abs(scaled.slacks_R)).argmax())
            within = _find_feasible(problem, index, deadline - time.monotonic())
            if not within.found:
                return Outcome([], kept.cutoff, within.complete, scaled.in_units(root_R))
            kept.offer(within.found[0][0], problem.objective(within.found[0][0]))
        elif tree.stopped or kept.settled():
            break
    bound, complete = tree.bound()
    return Outcome(kept.found, bound, complete, scaled.in_units(root_R), tree.nodes)


def _find_feasible(problem: Problem, index: int, time_limit_s: float) -> Outcome:
    """A choice within the limits, whatever it scores: the least of one limit's cost under the others comes below it."""
    others = problem.only([name for number, name in enumerate(problem.names) if number != index])
    room = problem.slacks[index]
    costs_KJ = problem.costs_KJR[:, :, index]
    outcome = search(others.with_scores(costs_KJ), time_limit_s=time_limit_s, good_enough=room)
    met = [scored for scored in outcome.found if scored[1] <= room]
    return replace(outcome, found=met, complete=bool(met) or outcome.complete or outcome.bound > room)


def _ceiling(problem: Problem) -> Fraction:
    """More than any choice scores."""
    highest = float(np.where(problem.allowed_KJ, problem.scores_KJ, -np.inf).max(axis=1).sum())
    margin = (abs(highest) + float(np.abs(problem.scores_KJ).max())) / 1000
    return Fraction(highest) + Fraction(margin or 1)


class _Tree:
    """The nodes that are still open, over the options that the root leaves."""

    def __init__(self, problem: Problem, scaled: Scaled, root_R: Floats, kept: IncumbentPool, record: bool) -> None:
        self.problem, self.scaled, self.record = problem, scaled, record
        self.kept = kept
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
        self._shrink()

    def _initial_heuristic(self) -> None:
        """A first choice: the root's, made to fit and improved."""
        start = tuple(self.reduced_KJ.argmin(axis=1).tolist())
        found = improve(self.scaled, self.reduced_KJ, start)
        self._try_incumbent(found)

    def _goal(self) -> float:
        """The scaled bound at which a node holds nothing that is wanted."""
        less = self.step * (1 - Fraction(1, 2**20)) if self.kept.enough else Fraction(0)
        return float(self.kept.cutoff - less) * self.unit

    def _shrink(self) -> None:
        """Keep the options whose reduced cost leaves room for a better choice, cheapest first; drop dominated ones."""
        room = self._goal() - self.root_bound + 2 * self.rounding_error
        open_KJ = (self.reduced_KJ < room) & self.scaled.allowed_KJ
        open_KJ[np.arange(len(open_KJ)), self.reduced_KJ.argmin(axis=1)] = True
        self.num_open = int(open_KJ.sum())
        counts_K = open_KJ.sum(axis=1)
        self.slots_K = np.flatnonzero(counts_K > 1)
        self.decided_K = np.flatnonzero(counts_K == 1)
        self.decided_options_K = open_KJ[self.decided_K].argmax(axis=1)
        width = int(counts_K.max())
        order_KJ = np.where(open_KJ, self.reduced_KJ, np.inf).argsort(axis=1, kind="stable")[:, :width]
        self.options_KJ = order_KJ[self.slots_K]
        rows = self.slots_K[:, None]
        self.scores_KJ = self.scaled.scores_KJ[rows, self.options_KJ]
        self.costs_KJR = self.scaled.costs_KJR[rows, self.options_KJ]
        allowed_KJ = open_KJ[rows, self.options_KJ]
        self.base = float(self.scaled.scores_KJ[self.decided_K, self.decided_options_K].sum())
        self.slacks_R = self.scaled.slacks_R - self.scaled.costs_KJR[self.decided_K, self.decided_options_K].sum(axis=0)
        if self.kept.count == 1 and not self.record:  # a proof speaks of every option
            allowed_KJ &= ~self._dominated(allowed_KJ)
        self.allowed_NKJ = allowed_KJ[None]
        self.multipliers_NR = self.root_R[None].copy()
        self.bounds_N = np.array([self.root_bound])
        self.ids_N = np.array([0])
        if self.record:
            self.nodes = [ProofNode(multipliers=self.scaled.in_units(self.root_R))]
        self.whole: WholeNumbers | None = None
        if not len(self.slots_K):
            self._try_incumbent(self._whole_choice(np.array([], dtype=np.int64)))
            self.bounds_N = np.array([])

    def _dominated(self, allowed_KJ: Flags) -> Flags:
        """Options beside which another one is no worse in score and in every cost; of equals the first stays."""
        values_KJV = np.concatenate([self.scores_KJ[:, :, None], self.costs_KJR], axis=2)
        values_KJV[~allowed_KJ] = np.inf
        no_worse_KJJ = (values_KJV[:, :, None] <= values_KJV[:, None]).all(axis=3)
        width = no_worse_KJJ.shape[1]
        earlier_JJ = np.arange(width)[:, None] < np.arange(width)
        beats_KJJ = no_worse_KJJ & (earlier_JJ | ~no_worse_KJJ.transpose(0, 2, 1))
        dominated_KJ: Flags = beats_KJJ.any(axis=1)
        return dominated_KJ

    def grow(self, deadline: float, max_nodes: int | None, good_enough: Fraction | None) -> bool:
        """Work on open nodes until none is left or it is time to stop; True asks for a smaller tree."""
        while len(self.bounds_N):
            over = time.monotonic() > deadline or (max_nodes is not None and self.num_nodes >= max_nodes)
            good = good_enough is not None and self.kept.enough and self.kept.cutoff <= good_enough
            if over or good:
                self.stopped = True
                return False
            improved = self._work(self._take())
            if improved and not self.record:
                left = int((self.reduced_KJ < self._goal() - self.root_bound + 2 * self.rounding_error).sum())
                if left <= SHRINK * self.num_open:
                    return True
        return False

    def bound(self) -> tuple[Fraction, bool]:
        """What is proven, and whether all is."""
        if not len(self.bounds_N):
            return self.kept.closed_at, True
        doubt_N = self.scaled.rounding_error(self.multipliers_NR)
        lowest = float(np.min(self.bounds_N - doubt_N))
        lowest = max(lowest, self.root_bound - self.rounding_error)
        return min(Fraction(math.ldexp(lowest, self.scaled.score_exponent)), self.kept.closed_at), False

    def _take(self) -> "_Batch":
        """The newest nodes, the best of their siblings: deep early, so that choices are found and memory is small."""
        size = int(np.clip(BATCH_VALUES // max(1, self.scores_KJ.size), 8, BATCH_SIZE))
        batch = _Batch(self.allowed_NKJ[-size:], self.multipliers_NR[-size:], self.bounds_N[-size:], self.ids_N[-size:])
        self.allowed_NKJ, self.multipliers_NR = self.allowed_NKJ[:-size], self.multipliers_NR[:-size]
        self.bounds_N, self.ids_N = self.bounds_N[:-size], self.ids_N[:-size]
        return batch

    def _work(self, batch: "_Batch") -> bool:
        """Bound, cross out and split some nodes; says whether the goal came closer."""
        before = self.kept.cutoff
        self.num_nodes += len(batch.bounds_N)
        self.num_batches += 1
        changes_NKJ = self._climb(batch)
        if self.record and self.num_batches == 1 and not self._closes_all(batch.multipliers_NR[0]):
            # Whoever checks the proof crosses out by what the root records, as was done here to begin with.
            batch.multipliers_NR[0], batch.bounds_N[0] = self.root_R, self.root_bound
        cutoff = self._goal()
        open_N = ~self._closed(batch, cutoff)
        self._record_leaf(batch, ~open_N)
        batch, changes_NKJ = batch.where(open_N), changes_NKJ[open_N]
        if len(batch.bounds_N):
            self._split(batch, changes_NKJ, cutoff)
        return self.kept.cutoff < before

    def _climb(self, batch: "_Batch") -> Floats:
        """Raise bounds; returns how often each option was the best of its slot, late steps counting more."""
        num_nodes = len(batch.bounds_N)
        slots_K = np.arange(len(self.slots_K))
        here_NR = batch.multipliers_NR.copy()
        batch.bounds_N = np.full(num_nodes, -np.inf)
        changes_NKJ = np.zeros(batch.allowed_NKJ.shape)
        active_N = np.arange(num_nodes)
        stride_N = np.ones(num_nodes)
        nearest: tuple[float, Numbers] | None = None
        cutoff = self._goal()
        for step in range(NUM_STEPS):
            at_NR = here_NR[active_N]
            priced_NKJ = self._priced(at_NR, batch.allowed_NKJ[active_N])
            picks_NK = priced_NKJ.argmin(axis=2)
            bounds_N = priced_NKJ.min(axis=2).sum(axis=1) + self.base - at_NR @ self.slacks_R
            over_NR = self.costs_KJR[slots_K, picks_NK].sum(axis=1) - self.slacks_R
            rises_N = bounds_N > batch.bounds_N[active_N]
            risen_N = active_N[rises_N]
            batch.bounds_N[risen_N], batch.multipliers_NR[risen_N] = bounds_N[rises_N], at_NR[rises_N]
            stride_N[active_N[~rises_N]] *= 0.7
            changes_NKJ[active_N[:, None], slots_K, picks_NK] += step + 1
            if not self.record:
                scores_N = self.scores_KJ[slots_K, picks_NK].sum(axis=1) + self.base
                excess_N = np.maximum(over_NR, 0.0).sum(axis=1)
                good_N = np.flatnonzero((excess_N <= NEAR) & (scores_N < cutoff))
                for index in good_N[scores_N[good_N].argsort(kind="stable")[: self.kept.count]]:
                    self._try_incumbent(self._whole_choice(picks_NK[index]))
                cutoff = self._goal()
                near = int(excess_N.argmin())
                if nearest is None or excess_N[near] < nearest[0]:
                    nearest = float(excess_N[near]), picks_NK[near]
            slope_NR = np.where((at_NR <= 0) & (over_NR < 0), 0.0, over_NR)
            length_N = (slope_NR**2).sum(axis=1)
            lift_N = OVERSHOOT * (cutoff - bounds_N) + 8 * self.scaled.rounding_error(at_NR)
            stride = np.where(length_N > 0, lift_N / np.maximum(length_N, 1e-300), 0.0)
            here_NR[active_N] = np.maximum(0.0, at_NR + (stride * stride_N[active_N])[:, None] * slope_NR)
            active_N = active_N[(batch.bounds_N[active_N] < cutoff) & (length_N > 0)]
            if not len(active_N):
                break
        if nearest is not None and (self.num_batches <= IMPROVED or self.num_batches % IMPROVED == 0):
            self._try_incumbent(improve(self.scaled, self.reduced_KJ, self._whole_choice(nearest[1])))
        return changes_NKJ

    def _priced(self, multipliers_NR: Floats, allowed_NKJ: Flags) -> Floats:
        """Score and priced costs of the options of nodes; infinite where they are crossed out."""
        priced_NM = multipliers_NR @ self.costs_KJR.reshape(self.scores_KJ.size, len(self.slacks_R)).T
        priced_NKJ: Floats = priced_NM.reshape(allowed_NKJ.shape)
        priced_NKJ += self.scores_KJ
        np.copyto(priced_NKJ, np.inf, where=~allowed_NKJ)
        return priced_NKJ

    def _closed(self, batch: "_Batch", cutoff: float) -> Flags:
        """Which nodes hold nothing better; those that floats cannot tell are told in whole numbers."""
        doubt_N = self.scaled.rounding_error(batch.multipliers_NR)
        closed_N: Flags = batch.bounds_N - doubt_N >= cutoff
        if self.kept.enough:
            for index in np.flatnonzero(~closed_N & (batch.bounds_N + doubt_N >= cutoff)):
                closed_N[index] = self._closed_exactly(batch.allowed_NKJ[index], batch.multipliers_NR[index])
        return closed_N

    def _closes_all(self, multipliers_R: Floats) -> bool:
        """Whether the root holds nothing better by these multipliers, with no option crossed out before."""
        costs = [self.problem.costs_KJR[:, :, index].tolist() for index in range(len(self.problem.slacks))]
        whole = WholeNumbers(self.problem.scores_KJ.tolist(), costs, self.problem.slacks)
        allowed: Allowed = [np.flatnonzero(allowed_J).tolist() for allowed_J in self.problem.allowed_KJ]
        return remaining(whole, allowed, self.scaled.in_units(multipliers_R), self.kept.cutoff, self.step) is None

    def _closed_exactly(self, allowed_KJ: Flags, multipliers_R: Floats) -> bool:
        """The same for one node."""
        if self.whole is None:
            self.whole = self._in_whole_numbers()
        decided: Allowed = [[0] for _ in self.decided_K]
        allowed = [np.flatnonzero(allowed_J).tolist() for allowed_J in allowed_KJ]
        multipliers = self.scaled.in_units(multipliers_R)
        return remaining(self.whole, decided + allowed, multipliers, self.kept.cutoff, self.step) is None

    def _in_whole_numbers(self) -> WholeNumbers:
        """The decided slots with their option, then the open ones with theirs."""
        problem = self.problem

        def rows(values_KJ: Floats) -> list[list[float]]:
            decided: list[float] = values_KJ[self.decided_K, self.decided_options_K].tolist()
            undecided: list[list[float]] = values_KJ[self.slots_K[:, None], self.options_KJ].tolist()
            return [[value] for value in decided] + undecided

        costs = [rows(problem.costs_KJR[:, :, index]) for index in range(len(problem.limits))]
        return WholeNumbers(rows(problem.scores_KJ), costs, problem.slacks)

    def _split(self, batch: "_Batch", changes_NKJ: Floats, cutoff: float) -> None:
        """Cross out, and replace nodes by their children."""
        num_nodes = len(batch.bounds_N)
        priced_NKJ = self._priced(batch.multipliers_NR, batch.allowed_NKJ)
        reached_NKJ = priced_NKJ - priced_NKJ.min(axis=2, keepdims=True) + batch.bounds_N[:, None, None]
        doubt_N = self.scaled.rounding_error(batch.multipliers_NR)
        allowed_NKJ = batch.allowed_NKJ & (reached_NKJ - 2 * doubt_N[:, None, None] < cutoff)
        counts_NK = allowed_NKJ.sum(axis=2)
        changes_NKJ = np.where(allowed_NKJ, changes_NKJ, 0.0)
        slots_N = np.where(counts_NK > 1, 1e-9 + self._branching_scores(batch, changes_NKJ), 0.0).argmax(axis=1)
        nodes_N = np.arange(num_nodes)
        empty_N = (counts_NK == 0).any(axis=1)
        leaf_N = empty_N | (counts_NK[nodes_N, slots_N] == 1)
        for index in np.flatnonzero(leaf_N & ~empty_N):
            self._try_incumbent(self._whole_choice(allowed_NKJ[index].argmax(axis=1)))
        self._record_leaf(batch, leaf_N)
        parents_C, options_C = np.nonzero(allowed_NKJ[nodes_N, slots_N] & ~leaf_N[:, None])
        slots_C = slots_N[parents_C]
        children_CKJ = allowed_NKJ[parents_C]
        rows_C = np.arange(len(parents_C))
        children_CKJ[rows_C, slots_C] = False
        children_CKJ[rows_C, slots_C, options_C] = True
        bounds_C = reached_NKJ[parents_C, slots_C, options_C]
        ids_C = self._note_children(batch, parents_C, slots_C, options_C)
        order_C = np.argsort(-bounds_C, kind="stable")
        self.allowed_NKJ = np.concatenate([self.allowed_NKJ, children_CKJ[order_C]])
        self.multipliers_NR = np.concatenate([self.multipliers_NR, batch.multipliers_NR[parents_C][order_C]])
        self.bounds_N = np.concatenate([self.bounds_N, bounds_C[order_C]])
        self.ids_N = np.concatenate([self.ids_N, ids_C[order_C]])

    def _branching_scores(self, batch: "_Batch", changes_NKJ: Floats) -> Floats:
        """How much the priced costs of each slot changed while multipliers moved: variances, summed over the costs."""
        shares_NKJ = changes_NKJ / np.maximum(changes_NKJ.sum(axis=2, keepdims=True), 1e-9)
        unrest_NK = np.zeros(shares_NKJ.shape[:2])
        for costs_KJ, prices_N in zip(np.moveaxis(self.costs_KJR, 2, 0), batch.multipliers_NR.T, strict=True):
            variance_NK = (shares_NKJ * costs_KJ**2).sum(axis=2) - (shares_NKJ * costs_KJ).sum(axis=2) ** 2
            unrest_NK += np.maximum(variance_NK, 0.0) * prices_N[:, None] ** 2
        return unrest_NK

    def _record_leaf(self, batch: "_Batch", which_N: Flags) -> None:
        """Record nodes that need no children."""
        if self.record:
            for index in np.flatnonzero(which_N):
                multipliers = self.scaled.in_units(batch.multipliers_NR[index])
                self.nodes[batch.ids_N[index]] = ProofNode(multipliers=multipliers)

    def _note_children(self, batch: "_Batch", parents_C: Numbers, slots_C: Numbers, options_C: Numbers) -> Numbers:
        """Record nodes that were split, and number their children."""
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

    def _whole_choice(self, picks_K: Numbers) -> Choice:
        """A choice for all slots from one for the open ones."""
        choice_K = np.zeros(len(self.problem.scores_KJ), dtype=np.int64)
        choice_K[self.decided_K] = self.decided_options_K
        choice_K[self.slots_K] = self.options_KJ[np.arange(len(self.slots_K)), picks_K]
        return tuple(choice_K.tolist())

    def _try_incumbent(self, choice: Choice) -> None:
        """Keep a choice that is within the limits and better than what is kept; exact."""
        slots_K = np.arange(len(choice))
        score = self.scaled.scores_KJ[slots_K, choice].sum()
        over_R = self.scaled.costs_KJR[slots_K, choice].sum(axis=0) - self.scaled.slacks_R
        if score > float(self.kept.cutoff) * self.unit + NEAR or (over_R > NEAR).any():
            return  # far from it, also with all that floats may have lost
        objective = self.problem.objective(choice)
        if objective < self.kept.cutoff and ((over_R < -NEAR).all() or self.problem.fits(choice)):
            self.kept.offer(choice, objective)


@dataclass
class _Batch:
    """Nodes that are worked on together."""

    allowed_NKJ: Flags
    multipliers_NR: Floats
    bounds_N: Floats
    ids_N: Numbers

    def where(self, which_N: Flags) -> "_Batch":
        """Some of them."""
        return _Batch(
            self.allowed_NKJ[which_N], self.multipliers_NR[which_N], self.bounds_N[which_N], self.ids_N[which_N]
        )
