"""Why a layer of the child has its sub-blocks: the best choice that has another option there."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from components.core.base.config import Config
from components.search.config import Measure
from components.search.costs.resources import Costs
from components.search.scoring.score_table import Rows, ShardScores, standard_error
from components.search.solver.option_table import OptionTable
from components.search.solver.problem import Choice
from components.search.solver.solve import MAX_NODES, solve_problem
from components.search.space.layer_space import Part

NOISE = 2.0
"""Standard errors that a difference must exceed to count as one: about 95 % of chance differences do not."""
NODES = 1000
"""Nodes that the search for a next best child may take; beyond, the best one found counts."""


class Margin(Config):
    """A slot of the best child against the best child that has another option there."""

    layer: int
    """Layer of the parent."""
    part: Part
    """Attention or FFN."""
    chosen: str
    """What the best child has."""
    following: str | None = None
    """What the next best has; None where nothing else is within the limits."""
    difference: float | None = None
    """What the next best scores more."""
    error: float | None = None
    """Standard error of that, from the rows of text that both were scored on; None where it is not known."""
    within_noise: bool | None = None
    """Whether the difference is less than two standard errors: other text could have turned the choice."""


@dataclass(frozen=True)
class Alternative:
    """An option of a slot, and the best child that has it.

    Attributes:
        option: its name.
        chosen: whether the child has it.
        score: its own score, nats a token.
        own_costs: what it takes by itself.
        objective: score of the best child that has it, nats a token; None where no such child is within the limits, or
            the recipe fixes another option.
        difference: that objective less the score of the best child; None where the objective is.
        error: standard error of the difference, from the rows of text that both were scored on; None where not known.
        within_noise: whether the difference is less than two standard errors; None where the difference is.
        costs: of that child; None where there is none.
        changed: other slots that differ between that child and the best one.
    """

    option: str
    chosen: bool
    score: float
    own_costs: Costs
    objective: float | None
    difference: float | None
    costs: Costs | None
    changed: int | None
    error: float | None = None
    within_noise: bool | None = None


@dataclass(frozen=True)
class SlotReason:
    """Why a slot has its option.

    Attributes:
        part: attention or FFN.
        chosen: name of the option.
        reason: one sentence.
        alternatives: every option, the best child first.
    """

    part: Part
    chosen: str
    reason: str
    alternatives: tuple[Alternative, ...]


def explain_layer(
    table: OptionTable, limits: Mapping[str, float], choice: Choice, layer: int, margins: Sequence[Margin] = ()
) -> list[SlotReason]:
    """Why a layer has its attention and its FFN.

    Args:
        table: options of all layers.
        limits: absolute limits.
        choice: the best choice within them.
        layer: of the parent, from 0.
        margins: for each slot, the difference to the next best choice and its standard error.
    """
    known = {(margin.layer, margin.part): margin for margin in margins}
    return [
        _reason(table, limits, choice, number, known.get((slot.layer, slot.part)))
        for number, slot in enumerate(table.slots)
        if slot.layer == layer
    ]


def _reason(
    table: OptionTable, limits: Mapping[str, float], choice: Choice, number: int, margin: Margin | None
) -> SlotReason:
    slot = table.slots[number]
    found = [
        _with_noise(_alternative(table, limits, choice, number, index), margin) for index in range(len(slot.options))
    ]
    found.sort(key=lambda alternative: (alternative.difference is None, alternative.difference, not alternative.chosen))
    chosen = next(alternative for alternative in found if alternative.chosen)
    return SlotReason(
        part=slot.part,
        chosen=chosen.option,
        reason=f"{chosen.option} is what the recipe fixes here"
        if slot.fixed_option is not None
        else _sentence(chosen, [alternative for alternative in found if not alternative.chosen]),
        alternatives=tuple(found),
    )


def _alternative(
    table: OptionTable, limits: Mapping[str, float], choice: Choice, number: int, index: int
) -> Alternative:
    """The best child in which a slot has this option."""
    problem = table.problem(table.scores, limits)
    chosen = choice[number] == index
    slot = table.slots[number]
    with_option = problem.with_fixed({number: index})
    mip_start = [choice] if chosen else []
    solution = (
        solve_problem(with_option, mip_start=mip_start, max_nodes=MAX_NODES) if index in slot.allowed_options else None
    )
    option = slot.options[index]
    if solution is None:
        return Alternative(option.name, chosen, option.score, option.costs, None, None, None, None)
    return Alternative(
        option=option.name,
        chosen=chosen,
        score=option.score,
        own_costs=option.costs,
        objective=solution.objective,
        difference=float(problem.objective(solution.choice) - problem.objective(choice)),
        costs=table.costs(solution.choice),
        changed=sum(a != b for k, (a, b) in enumerate(zip(solution.choice, choice, strict=True)) if k != number),
    )


def _with_noise(alternative: Alternative, margin: Margin | None) -> Alternative:
    """Add the standard error if the margin is about this option."""
    if margin is None or alternative.option != margin.following or alternative.difference is None:
        return alternative
    return replace(alternative, error=margin.error, within_noise=margin.within_noise)


def _sentence(chosen: Alternative, others: list[Alternative]) -> str:
    """The chosen option against the next best."""
    if not others:
        return f"{chosen.option} is all that is offered here"
    following = others[0]
    if following.difference is None:
        return f"{chosen.option} is the only option with which any child is within the limits"
    if following.difference == 0:
        return f"{following.option} would be just as good: the best child that has it scores the same"
    if following.difference < 0:
        ahead = f"{following.option} scores better by {-following.difference:.4g} nats a token"
        return f"{ahead}, and a short distillation of several candidates chose this child"
    elsewhere = f"with {following.changed} other sub-blocks changed" if following.changed else "all else unchanged"
    error = "" if following.error is None else f" ± {following.error:.2g}"
    noise = ", within the noise" if following.within_noise else ""
    return (
        f"the next best is {following.option}: {following.difference:.4g}{error} nats a token more{noise}, {elsewhere}"
    )


def margins(
    table: OptionTable, limits: Mapping[str, float], choice: Choice, shards: Sequence[ShardScores], measure: Measure
) -> tuple[Margin, ...]:
    """For each slot, how much worse the best child with another option there is, and how well that is known.

    Args:
        table: options of all slots.
        limits: absolute limits.
        choice: the best one within them.
        shards: what scores were made from.
        measure: what the scores of the table are.
    """
    problem = table.problem(table.scores, limits).with_fixed(table.fixed_options)
    sums, tokens_R = _row_sums(table, shards, measure)
    found = []
    for number, slot in enumerate(table.slots):
        others_KJ = problem.allowed_KJ.copy()
        others_KJ[number, choice[number]] = False
        margin = Margin(layer=slot.layer, part=slot.part, chosen=slot.options[choice[number]].name)
        if others_KJ[number].any():
            other = solve_problem(dataclasses.replace(problem, allowed_KJ=others_KJ), max_nodes=NODES)
            if other is not None:
                difference = float(problem.objective(other.choice) - problem.objective(choice))
                differences_R = sum(
                    (sums[k][b] - sums[k][a] for k, (a, b) in enumerate(zip(choice, other.choice, strict=True))),
                    start=np.zeros_like(tokens_R),
                )
                error = standard_error(differences_R, tokens_R)
                margin = margin.model_copy(
                    update={
                        "following": slot.options[other.choice[number]].name,
                        "difference": difference,
                        "error": error,
                        "within_noise": None if error is None else difference < NOISE * error,
                    }
                )
        found.append(margin)
    return tuple(found)


def _row_sums(table: OptionTable, shards: Sequence[ShardScores], measure: Measure) -> tuple[list[list[Rows]], Rows]:
    """Of each option of each slot, the sums over the rows that all variants were scored on; and the tokens of those."""
    blocks = [block for shard in shards for block in shard.blocks]
    rows = min((len(block.row_sums.get(measure, ())) for block in blocks), default=0)
    known = {(block.layer, block.part, block.size): np.array(block.row_sums[measure][:rows]) for block in blocks}
    nothing = np.zeros(rows)
    sums = [
        [known.get((slot.layer, slot.part, option.size), nothing) for option in slot.options] for slot in table.slots
    ]
    # A problem counts once, a row of text by its tokens.
    tokens = [1] * rows if measure == "accuracy" else shards[0].row_tokens[:rows] if shards else ()
    return sums, np.array(tokens, dtype=np.float64)
