"""Baselines of the exact choice: other choices at the same limits, from the same library."""

import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.core.base.errors import InfeasibleBudget
from components.search.costs.resources import Costs
from components.search.solver.option_table import OptionTable, Slot
from components.search.solver.problem import Choice
from components.search.solver.solve import fits, minimise, solve_problem

NODES = 20_000
"""Nodes after which a baseline is not searched any further: layers that are all alike have many equal choices."""


def random_choice(table: OptionTable, limits: Mapping[str, float], seed: int) -> tuple[int, ...]:
    """A choice within the limits that ignores quality: the best one for random scores.

    Raises:
        InfeasibleBudget: no choice meets the limits.

    Source: arXiv 2411.19146, table 15 (random choice from the trained library).
    """
    generator = random.Random(seed)
    scores = [[generator.random() for _ in slot.options] for slot in table.slots]
    solution = minimise(table, scores, limits)
    if solution is None:
        raise InfeasibleBudget("no random choice meets the limits", hint="raise the limits")
    return solution.choice


def most_parameters(table: OptionTable, limits: Mapping[str, float], known: Choice) -> Choice:
    """The choice with the most parameters within the limits, or nearly so; its rule is that size is quality.

    Args:
        table: options of all slots.
        limits: absolute limits.
        known: a choice within them, to begin with.

    Source: arXiv 2411.19146, table 14.
    """
    negative = [[-parameters for parameters in row] for row in table.costs_of("parameters")]
    solution = solve_problem(table.problem(negative, limits), mip_start=[known], max_nodes=NODES)
    assert solution is not None, "there is the known one"
    return solution.choice


def uniform_choice(table: OptionTable, limits: Mapping[str, float]) -> tuple[int, ...] | None:
    """The same attention and the same FFN in every layer that offers them, the best pair within the limits.

    A layer that does not offer one has the parent's sub-block, and a layer with a fixed option has that. None where no
    pair is within the limits.
    """
    names = [[option.name for option in slot.options] for slot in table.slots]
    offered = [list(dict.fromkeys(itertools.chain.from_iterable(names[part::2]))) for part in range(min(2, len(names)))]
    choices = [
        tuple(
            table.fixed_options.get(slot, row.index(pair[slot % 2]) if pair[slot % 2] in row else 0)
            for slot, row in enumerate(names)
        )
        for pair in itertools.product(*offered)
    ]
    within = [choice for choice in choices if fits(table.costs(choice), limits)]
    return min(within, key=table.score, default=None)


@dataclass(frozen=True)
class Candidate:
    """One way to build a whole layer: an option for each of its slots."""

    options: tuple[int, ...]
    score: float
    costs: Costs


def greedy_choice(table: OptionTable, limits: Mapping[str, float]) -> tuple[int, ...]:
    """Layer by layer, easiest first, the best candidate that the layer's share of the budget allows.

    The budget is split evenly over layers; what a layer does not use goes to the next. What later layers need at least
    is reserved for them. So the result is within the limits if each layer has one candidate that is cheapest in
    every cost.

    Source: arXiv 2411.19146, appendix F.2.2.
    """
    layers = {
        layer: _candidates(list(slots)) for layer, slots in itertools.groupby(table.slots, key=lambda slot: slot.layer)
    }
    order = sorted(layers, key=lambda layer: statistics.fmean(candidate.score for candidate in layers[layer]))
    cheapest = {layer: _cheapest(candidates, limits) for layer, candidates in layers.items()}
    available = {resource: limit - table.fixed.of(resource) for resource, limit in limits.items()}
    spent, chosen = Costs(), {}
    for done, layer in enumerate(order, 1):
        budget = {resource: whole * done / len(order) for resource, whole in available.items()}
        reserved = sum((cheapest[later].costs for later in order[done:]), start=Costs())
        allowed = [
            candidate
            for candidate in layers[layer]
            if fits(spent + candidate.costs, budget) and fits(spent + candidate.costs + reserved, available)
        ]
        chosen[layer] = min(allowed, key=lambda candidate: candidate.score, default=cheapest[layer])
        spent += chosen[layer].costs
    return tuple(itertools.chain.from_iterable(chosen[layer].options for layer in layers))


def _candidates(slots: Sequence[Slot]) -> list[Candidate]:
    """Every combination of the options of a layer's slots; scores and costs add up."""
    return [
        Candidate(
            options=options,
            score=sum(slot.options[option].score for slot, option in zip(slots, options, strict=True)),
            costs=sum((slot.options[option].costs for slot, option in zip(slots, options, strict=True)), start=Costs()),
        )
        for options in itertools.product(*(slot.allowed_options for slot in slots))
    ]


def _cheapest(candidates: Sequence[Candidate], limits: Mapping[str, float]) -> Candidate:
    """The candidate with the lowest costs, summed over limited resources as shares of their limits."""
    return min(candidates, key=lambda candidate: sum(candidate.costs.of(r) / limit for r, limit in limits.items()))
