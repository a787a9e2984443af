"""Certificate that a choice is the best: a tree of Lagrangian bounds, checked in integers from the table alone.

Each node of the tree has multipliers. They give a lower bound on the score of any feasible choice from the node's
allowed options, and, by reduced costs, on the score with any one of them. Options that cannot lead below the certified
objective are removed; the node is branched at one slot of the rest. A node is a leaf if nothing is left, or a single
choice that is no better or infeasible.

The check uses nothing of the solver, and no float decides.

Source: M. L. Fisher, The Lagrangian Relaxation Method for Solving Integer Programming Problems, 1981.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from pydantic import Field

from components.core.base.config import Config
from components.core.base.errors import InputError, TesseraError
from components.search.solver.problem import Choice, exact, limit_with_tolerance

Allowed = list[list[int]]
"""Option numbers that each slot may still have."""


class WrongCertificate(TesseraError):
    """A certificate does not prove what it says."""


class ProofNode(Config):
    """One node of the tree."""

    multipliers: tuple[float, ...]
    """Score a unit of each limited cost, in the order of the certificate's limits; never below 0."""
    slot: int | None = None
    """Slot at which the node is branched; None for a leaf."""
    children: dict[int, int] = Field(default_factory=dict)
    """Number of the child for each option that the slot may still have."""


class Certificate(Config):
    """A choice, a bound that no choice beats, and the proof of it."""

    limits: dict[str, float]
    """Limits by name of the cost."""
    fixed: dict[int, int] = Field(default_factory=dict)
    """Option of each slot whose option is fixed."""
    choice: Choice
    """Option number of each slot."""
    objective: str
    """Exact sum of its scores, as a fraction."""
    bound: str
    """No choice within the limits scores less; equal to the objective where the choice is proven best."""
    nodes: tuple[ProofNode, ...]
    """The tree, from the root; the root alone where it proves no more than its own bound."""

    @property
    def gap(self) -> Fraction:
        """Distance of objective and bound, as a share of the objective."""
        return relative_gap(Fraction(self.objective), Fraction(self.bound))


def relative_gap(objective: Fraction, bound: Fraction) -> Fraction:
    """Distance of an objective and its bound as a share of the objective; of 1 where that is 0."""
    return (objective - bound) / (abs(objective) or 1)


class IntegerTable:
    """Scores and costs as integers over common denominators."""

    def __init__(
        self,
        scores: Sequence[Sequence[float]],
        costs: Sequence[Sequence[Sequence[float]]],
        slacks: Sequence[Fraction],
    ) -> None:
        """Take a table.

        Args:
            scores: of each option of each slot.
            costs: one table like the scores for each limit.
            slacks: largest feasible sum of each cost.
        """
        self.slacks = list(slacks)
        self.score_unit, self.scores = _integers(scores)
        self.cost_units, self.costs = [], []
        for table in costs:
            unit, integers = _integers(table)
            self.cost_units.append(unit)
            self.costs.append(integers)

    def objective(self, choice: Choice) -> Fraction:
        """Sum of the scores."""
        return _chosen(self.scores, choice) * self.score_unit

    def fits(self, choice: Choice) -> bool:
        """Whether a choice is within the limits."""
        sums = (_chosen(table, choice) * unit for table, unit in zip(self.costs, self.cost_units, strict=True))
        return all(used <= slack for used, slack in zip(sums, self.slacks, strict=True))

    def step(self) -> Fraction:
        """Objectives of two choices differ by a multiple of this."""
        differences = (value - row[0] for row in self.scores for value in row)
        return math.gcd(*differences) * self.score_unit

    def reduced(self, allowed: Allowed, multipliers: Sequence[float]) -> tuple[Fraction, list[list[int]], Fraction]:
        """The Lagrangian over the allowed options, and their reduced costs.

        Returns:
            The bound; the reduced cost of each allowed option, in units; the unit.
        """
        prices = [Fraction(value) for value in multipliers]
        weights = [
            price * unit / self.score_unit for price, unit in zip(prices, self.cost_units, strict=True)
        ]  # of one unit of cost, in units of score
        common = math.lcm(*(weight.denominator for weight in weights))
        factors = [int(weight * common) for weight in weights]
        priced = [(factor, table) for factor, table in zip(factors, self.costs, strict=True) if factor]
        total, rises = 0, []
        for slot, options in enumerate(allowed):
            scores = self.scores[slot]
            values = [scores[option] * common for option in options]
            for factor, table in priced:
                costs = table[slot]
                for index, option in enumerate(options):
                    values[index] += factor * costs[option]
            least = min(values)
            total += least
            rises.append([value - least for value in values])
        unit = self.score_unit / common
        limits = sum((price * slack for price, slack in zip(prices, self.slacks, strict=True)), start=Fraction(0))
        return total * unit - limits, rises, unit


def check(
    scores: Sequence[Sequence[float]],
    costs: Mapping[str, Sequence[Sequence[float]]],
    certificate: Certificate,
    fixed_costs: Mapping[str, float] | None = None,
) -> Fraction:
    """Verify a certificate against the table that it is about.

    Args:
        scores: of each option of each slot.
        costs: by name, of each option of each slot.
        certificate: choice, limits and proof.
        fixed_costs: by name, what counts against a limit whatever is chosen.

    Returns:
        The gap that is certified; 0 says that no choice within the limits scores less.

    Raises:
        WrongCertificate: the choice is not what it says, or the bound is not proven.
        InputError: it is about another table.
    """
    unknown = sorted(certificate.limits.keys() - costs.keys())
    if unknown or len(certificate.choice) != len(scores):
        raise InputError(
            f"the certificate is about another table: it limits {', '.join(certificate.limits) or 'nothing'} and "
            f"chooses for {len(certificate.choice)} slots, the table has {', '.join(costs)} and {len(scores)} slots"
        )
    if any(option not in range(len(row)) for row, option in zip(scores, certificate.choice, strict=True)):
        raise WrongCertificate("the choice names options that the table does not have")
    slacks = [
        limit_with_tolerance(exact(limit)) - exact((fixed_costs or {}).get(name, 0))
        for name, limit in certificate.limits.items()
    ]
    integers = IntegerTable(scores, [costs[name] for name in certificate.limits], slacks)
    objective, bound = Fraction(certificate.objective), Fraction(certificate.bound)
    if integers.objective(certificate.choice) != objective:
        scored = integers.objective(certificate.choice)
        raise WrongCertificate(f"the choice scores {float(scored)!r}, not {float(objective)!r}")
    if not integers.fits(certificate.choice):
        raise WrongCertificate("the choice exceeds a limit")
    if any(certificate.choice[slot] != option for slot, option in certificate.fixed.items()):
        raise WrongCertificate("the choice is not what was fixed")
    allowed = [
        [certificate.fixed[slot]] if slot in certificate.fixed else list(range(len(row)))
        for slot, row in enumerate(scores)
    ]
    if bound < objective and len(certificate.nodes) == 1:
        _check_bound(integers, allowed, certificate.nodes[0], bound)
    elif bound == objective:
        _check_tree(integers, allowed, certificate.nodes, objective)
    else:
        raise WrongCertificate("the bound is neither the objective nor that of a single node")
    return certificate.gap


def _check_bound(integers: IntegerTable, allowed: Allowed, root: ProofNode, bound: Fraction) -> None:
    """The Lagrangian of the root is as high as the bound."""
    if min(root.multipliers, default=0.0) < 0 or integers.reduced(allowed, root.multipliers)[0] < bound:
        raise WrongCertificate("the multipliers do not prove the bound")


def _check_tree(integers: IntegerTable, allowed: Allowed, nodes: Sequence[ProofNode], objective: Fraction) -> None:
    """No choice of the allowed options scores less than the objective."""
    step = integers.step()
    todo = [(0, allowed)]
    while todo:
        number, options = todo.pop()
        if number not in range(len(nodes)):
            raise WrongCertificate(f"the proof has no node {number}")
        node = nodes[number]
        if min(node.multipliers, default=0.0) < 0 or len(node.multipliers) != len(integers.slacks):
            raise WrongCertificate(f"the multipliers of node {number} bound nothing")
        left = remaining(integers, options, node.multipliers, objective, step)
        if left is None or (all(len(row) == 1 for row in left) and not _better(integers, left, objective)):
            continue
        slot = node.slot
        if slot is None or slot not in range(len(left)):
            raise WrongCertificate(f"node {number} neither proves the bound nor is split")
        for option in left[slot]:
            child = node.children.get(option, -1)
            if child <= number:
                raise WrongCertificate(f"node {number} leaves option {option} of slot {slot} open")
            todo.append((child, [*left[:slot], [option], *left[slot + 1 :]]))


def remaining(
    integers: IntegerTable, options: Allowed, multipliers: Sequence[float], objective: Fraction, step: Fraction
) -> Allowed | None:
    """Options that a choice better than the objective may use; None where there is no such choice."""
    bound, rises, unit = integers.reduced(options, multipliers)
    if not bound < objective or (step and bound > objective - step):
        return None
    # A better choice scores less than the objective, and by a step at least.
    gap = (objective - bound) / unit
    most_rise = (objective - step - bound) / unit if step else None
    left = [
        [
            option
            for option, rise in zip(row, added, strict=True)
            if rise < gap and (most_rise is None or rise <= most_rise)
        ]
        for row, added in zip(options, rises, strict=True)
    ]
    return left if all(left) else None


def _better(integers: IntegerTable, single: Allowed, objective: Fraction) -> bool:
    """Whether the one choice that is left is within the limits and beats the objective."""
    choice = tuple(row[0] for row in single)
    return integers.objective(choice) < objective and integers.fits(choice)


def _integers(rows: Sequence[Sequence[float]]) -> tuple[Fraction, list[list[int]]]:
    """A table as multiples of a unit."""
    fractions = [[exact(value) for value in row] for row in rows]
    common = math.lcm(*(value.denominator for row in fractions for value in row))
    return Fraction(1, common), [
        [value.numerator * (common // value.denominator) for value in row] for row in fractions
    ]


def _chosen(table: Sequence[Sequence[int]], choice: Choice) -> int:
    return sum(row[option] for row, option in zip(table, choice, strict=True))
