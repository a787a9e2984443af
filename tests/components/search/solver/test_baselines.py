"""Baselines against every choice there is, on small tables."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from components.search.costs.resources import Costs
from components.search.solver.baselines import most_parameters, uniform_choice
from components.search.solver.option_table import Option, OptionTable, Slot
from components.search.solver.solve import fits

ATTENTION, FFN = (4, 2, 0), (8, 4, 0)


def make_table(seed: int, layers: int) -> OptionTable:
    """The first layer keeps its attention, as in a search."""
    dice = random.Random(seed)
    slots = []
    for layer, part in itertools.product(range(layers), ("attention", "ffn")):
        sizes = ATTENTION if part == "attention" else FFN
        offered = sizes[:-1] if layer == 0 and part == "attention" else sizes
        options = tuple(
            Option(
                name=f"{part}-{size}",
                size=size,
                score=dice.random() if size < sizes[0] else 0.0,
                costs=Costs(parameters=10 * size, latency_ms=size / 10),
            )
            for size in offered
        )
        slots.append(Slot(layer=layer, part=part, options=options))  # type: ignore[arg-type]
    return OptionTable(fixed=Costs(parameters=5), slots=tuple(slots))


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 3), st.floats(0.3, 1.0))
def test_the_most_parameters_that_fit(seed: int, layers: int, share: float) -> None:
    table = make_table(seed, layers)
    limits = {"latency_ms": share * table.costs(table.parent_choice).latency_ms}
    every = itertools.product(*(range(len(slot.options)) for slot in table.slots))
    within = [choice for choice in every if fits(table.costs(choice), limits)]
    best = max(table.costs(choice).parameters for choice in within)
    found = most_parameters(table, limits, within[0])
    assert fits(table.costs(found), limits)
    assert table.costs(found).parameters == best


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 3), st.floats(0.05, 1.0))
def test_the_best_uniform_choice(seed: int, layers: int, share: float) -> None:
    table = make_table(seed, layers)
    limits = {"parameters": share * table.costs(table.parent_choice).parameters}
    choices = []
    for attention, ffn in itertools.product(range(len(ATTENTION)), range(len(FFN))):
        first = attention if ATTENTION[attention] else 0  # without that option, it keeps the parent's
        choices.append((first, ffn) + (attention, ffn) * (layers - 1))
    within = [choice for choice in choices if fits(table.costs(choice), limits)]
    found = uniform_choice(table, limits)
    assert (found is None) == (not within)
    if found is not None:
        assert fits(table.costs(found), limits)
        assert table.score(found) == min(map(table.score, within))


def test_a_uniform_choice_leaves_a_layer_what_it_has_to_hold() -> None:
    table = make_table(0, 3)
    slots = tuple(
        slot.model_copy(update={"fixed_option": 0}) if number == 3 else slot for number, slot in enumerate(table.slots)
    )
    found = uniform_choice(table.model_copy(update={"slots": slots}), {"latency_ms": 2.0})
    assert found is not None
    assert found[3] == 0
    assert found[1] == found[5] != 0
