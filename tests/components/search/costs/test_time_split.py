"""Times of whole models split into parts: by hand, against brute force, and with planted costs and noise."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.model.decoder import TesseraForCausalLM
from components.search.config import Space
from components.search.costs.measured import counted_costs, shapes_to_measure
from components.search.costs.resources import Costs
from components.search.costs.time_split import TimeSplit, contradictions, split_times
from components.search.space.layer_space import PARTS, Shape, Size, Variant, layer_spaces

SPACES = layer_spaces(Space(ffn_fractions=(0.5,), num_key_value_heads=(2,)), ((4, 64),) * 4)
SIZES = (4, 3, 2, 1)
KINDS: tuple[Size, ...] = (*SIZES, "linear")
SHAPES = shapes_to_measure({Variant(part, size): Costs() for part in PARTS for size in KINDS}, 3)
PARTS_MS = st.lists(st.floats(0.01, 2.0), min_size=4, max_size=4).map(lambda ms: sorted(ms, reverse=True))


def times_of(shapes: list[Shape], fixed: float, parts: dict[Variant, float]) -> list[float]:
    """Time of each model, added up."""
    return [
        fixed + sum(parts.get(Variant(part, size), 0) for layer in s for part, size in zip(PARTS, layer, strict=True))
        for s in shapes
    ]


def planted(attention: list[float], ffn: list[float], linear: tuple[float, float]) -> dict[Variant, float]:
    """Costs of the variants of `SHAPES`; linear ones may cost more than any other."""
    by_part = zip(PARTS, (attention, ffn), linear, strict=True)
    return {Variant(part, size): ms for part, own, one in by_part for size, ms in zip(KINDS, (*own, one), strict=True)}


def is_monotone(parts: dict[Variant, float]) -> bool:
    """Whether no size costs more than the next larger one of its kind."""
    return all(
        parts[Variant(part, small)] <= parts[Variant(part, large)] + 1e-12
        for part in PARTS
        for large, small in itertools.pairwise(SIZES)
    )


@given(fixed=st.floats(0.1, 5.0), attention=PARTS_MS, ffn=PARTS_MS, linear=st.tuples(*[st.floats(0.01, 3.0)] * 2))
def test_planted_costs_are_found_again(
    fixed: float, attention: list[float], ffn: list[float], linear: tuple[float, float]
) -> None:
    true = planted(attention, ffn, linear)
    times = times_of(SHAPES, fixed, true)
    found_fixed, found, totals = split_times(SHAPES, times)
    assert found_fixed == pytest.approx(fixed, abs=1e-6)
    assert found == pytest.approx(true, abs=1e-6)
    assert totals == pytest.approx(times)
    assert contradictions(SHAPES, [[ms] for ms in times]) == []


@given(
    attention=PARTS_MS,
    ffn=PARTS_MS,
    noise=st.lists(st.floats(-0.02, 0.02), min_size=len(SHAPES), max_size=len(SHAPES)),
)
def test_with_noise_the_costs_are_monotone_and_as_close_as_the_noise(
    attention: list[float], ffn: list[float], noise: list[float]
) -> None:
    true = times_of(SHAPES, 1.0, planted(attention, ffn, (0.5, 0.5)))
    measured = [ms * (1 + off) for ms, off in zip(true, noise, strict=True)]
    fixed, found, totals = split_times(SHAPES, measured)
    assert min(fixed, *found.values()) >= 0
    assert is_monotone(found)
    # The truth is one of the admissible splits, so the best one is at least as close to what was measured.
    bound = math.sqrt(sum((off / (1 + off)) ** 2 for off in noise)) + 1e-9
    assert all(abs(total / ms - 1) <= bound for total, ms in zip(totals, measured, strict=True))


def test_a_size_measured_slower_than_a_larger_one_costs_as_much() -> None:
    true = planted([1.0, 0.9, 0.8, 0.7], [0.5, 0.4, 0.3, 0.2], (0.3, 0.3))
    wrong = {**true, Variant("attention", 3): 2.2}
    _, found, _ = split_times(SHAPES, times_of(SHAPES, 1.0, wrong))
    assert is_monotone(found)
    assert found[Variant("attention", 3)] == pytest.approx(found[Variant("attention", 4)])
    assert 1.0 < found[Variant("attention", 4)] < 2.2
    assert found[Variant("attention", 2)] == pytest.approx(0.8, abs=0.05)


def test_contradictions_are_beyond_the_noise_of_the_rounds() -> None:
    shapes: list[Shape] = [((4, 64),), ((2, 64),), ((2, 32),), (("linear", 64),)]
    assert contradictions(shapes, [[10.0] * 5, [11.0] * 5, [8.0] * 5, [12.0] * 5]) == [(1, 0)]
    noisy = [9.0, 9.5, 10.2, 11.0, 50.0]
    assert contradictions(shapes, [[10.0] * 5, noisy, [8.0] * 5, [12.0] * 5]) == []
    assert contradictions(shapes, [[10.0] * 5, [8.0] * 5, [12.0] * 5, [9.0] * 5]) == [(2, 0), (2, 1)]


def test_a_model_measured_in_more_rounds_has_them_all_in_the_spread() -> None:
    shapes: list[Shape] = [((4, 64),) * 2, ((4, 32),) * 2, ((4, 0),) * 2, ((4, 0), (0, 0))]
    split = TimeSplit.of(shapes, [[10.0] * 2, [8.0, 8.0, 8.0, 8.2], [6.0] * 2, [4.0] * 2])
    assert split.parts[Variant("ffn", 32)] == pytest.approx(1.0)
    assert split.spread[Variant("ffn", 32)] == pytest.approx(0.1)


def test_times_are_split_as_they_were_put_together(parent: TesseraForCausalLM) -> None:
    _, blocks = counted_costs(parent, SPACES)
    shapes = shapes_to_measure(blocks, 4)
    milliseconds = {4: 0.8, 2: 0.5, 0: 0.0}, {64: 0.3, 32: 0.2, 0: 0.0}
    heads, widths = milliseconds
    times = [1.5 + sum(heads[int(h)] + widths[int(w)] for h, w in shape) for shape in shapes]
    fixed, parts, explained = split_times(shapes, times)
    assert fixed == pytest.approx(1.5)
    expected = {("attention", 4): 0.8, ("attention", 2): 0.5, ("ffn", 64): 0.3, ("ffn", 32): 0.2}
    assert {(v.part, v.size): ms for v, ms in parts.items()} == pytest.approx(expected)
    assert explained == pytest.approx(times)


def test_the_spread_of_a_part_is_that_of_its_measurements(parent: TesseraForCausalLM) -> None:
    _, blocks = counted_costs(parent, SPACES)
    shapes = shapes_to_measure(blocks, 4)
    half, narrow = Variant("attention", 2), Variant("ffn", 32)

    def milliseconds(of_half: float) -> list[float]:
        parts = {Variant("attention", 4): 1.0, half: of_half, Variant("ffn", 64): 0.5, narrow: 0.25}
        return [
            2.0 + sum(parts.get(Variant("attention", h), 0) + parts.get(Variant("ffn", w), 0) for h, w in shape)
            for shape in shapes
        ]

    explained = TimeSplit.of(shapes, list(zip(*(milliseconds(ms) for ms in (0.5, 0.6, 0.9)), strict=True)))
    assert explained.parts[half] == pytest.approx(0.6)
    assert explained.spread[half] == pytest.approx(0.4)
    assert explained.spread[narrow] == pytest.approx(0, abs=1e-9)


def test_no_part_of_a_time_is_negative(parent: TesseraForCausalLM) -> None:
    _, blocks = counted_costs(parent, SPACES)
    fixed, parts, _ = split_times(shapes_to_measure(blocks, 4), [10.0, 9.0, 1.0, 10.5, 2.0, 3.0])
    assert fixed >= 0
    assert all(ms >= 0 for ms in parts.values())


@pytest.mark.parametrize("seed", range(20))
def test_times_are_split_with_the_least_error_of_all_monotone_splits(seed: int) -> None:
    generator = np.random.default_rng(seed)
    blocks = {Variant(part, size): Costs() for part in PARTS for size in SIZES}
    shapes = shapes_to_measure(blocks, 2)
    times = generator.uniform(1.0, 3.0, len(shapes))
    fixed, parts, totals = split_times(shapes, times.tolist())
    assert min(fixed, *parts.values()) >= 0

    steps = list(parts)  # what each size takes more than the next smaller one
    counts = np.array(
        [
            [1.0, *(sum(Variant(v.part, layer[PARTS.index(v.part)]).count >= v.count for layer in s) for v in steps)]
            for s in shapes
        ]
    )
    relative = counts / times[:, None]
    least = min(
        float(((relative[:, columns] @ found - 1) ** 2).sum())
        for size in range(1, counts.shape[1] + 1)
        for columns in map(list, itertools.combinations(range(counts.shape[1]), size))
        if (found := np.linalg.lstsq(relative[:, columns], np.ones(len(times)), rcond=None)[0]).min() >= 0
    )
    assert float(((np.array(totals) / times - 1) ** 2).sum()) == pytest.approx(least)


def test_costs_of_three_layers_add_up_to_the_time_of_a_whole_model() -> None:
    true = planted([2.0, 1.5, 1.2, 1.0], [0.9, 0.7, 0.4, 0.2], (0.6, 0.5))
    fixed, found, _ = split_times(SHAPES, times_of(SHAPES, 3.0, true))
    sizes: tuple[Size, ...] = (*KINDS, 0)
    child: Shape = tuple((sizes[layer % 5], sizes[(3 * layer) % 6]) for layer in range(30))
    assert times_of([child], fixed, found) == pytest.approx(times_of([child], 3.0, true))
