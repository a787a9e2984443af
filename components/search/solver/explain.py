"""Why a layer of the child has its sub-blocks: the best choice that has another option there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from components.search.costs.resources import Costs
from components.search.solver.option_table import OptionTable
from components.search.solver.problem import Choice
from components.search.solver.records import Margin
from components.search.solver.solve import MAX_NODES, solve_problem
from components.search.space.layer_space import Part


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
        difference: that less the score of the best child; None likewise.
        error: standard error of the difference, from the rows of text that both were scored on; None where not known.
        within_noise: whether the difference is less than two of those; None likewise.
        costs: of that child; None likewise.
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
    elsewhere = f"with {following.changed} other sub-blocks changed" if following.changed else "all else as it is"
    error = "" if following.error is None else f" ± {following.error:.2g}"
    noise = ", within the noise" if following.within_noise else ""
    return (
        f"the next best is {following.option}: {following.difference:.4g}{error} nats a token more{noise}, {elsewhere}"
    )
