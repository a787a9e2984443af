"""Samples of several corpora, exact by weight after any number of samples."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.base.errors import DataError
from components.core.text.corpus.blend import MAX_PERIOD, Blend

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@given(weights=WEIGHTS)
def test_after_any_number_of_samples_each_corpus_has_given_within_one_of_its_weight(weights: list[int]) -> None:
    blend, total = Blend(weights), sum(weights)
    counts = [0] * len(weights)
    for sample in range(2 * total + 3):
        corpus, own = blend.locate(sample)
        assert own == counts[corpus]  # the samples of a corpus come in order, and none is left out
        counts[corpus] += 1
        assert all(
            abs(count - Fraction((sample + 1) * weight, total)) < 1
            for count, weight in zip(counts, weights, strict=True)
        )
    assert blend.counts(2 * total + 3) == counts


@given(weights=WEIGHTS, far=st.integers(0, 10**12))
def test_a_sample_is_addressed_by_its_number_however_large(weights: list[int], far: int) -> None:
    blend = Blend(weights)
    corpus, own = blend.locate(far)
    before, after = blend.counts(far), blend.counts(far + 1)
    assert before[corpus] == own
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(k == corpus) for k in range(len(weights))]


def test_fractions_are_taken_as_they_are_written() -> None:
    assert Blend([0.7, 0.2, 0.1]).parts == [7, 2, 1]
    assert Blend([1.5, 0.25]).parts == [6, 1]
    assert Blend([3.0]).locate(12) == (0, 12)


@given(weights=WEIGHTS, data=st.data())
def test_the_longest_run_without_repetition_is_the_longest(weights: list[int], data: st.DataObject) -> None:
    blend = Blend(weights)
    limits = data.draw(st.lists(st.integers(0, 200), min_size=len(weights), max_size=len(weights)))
    longest = blend.longest(limits)

    def fits(num_samples: int) -> bool:
        return all(count <= limit for count, limit in zip(blend.counts(num_samples), limits, strict=True))

    assert fits(longest)
    assert not fits(longest + 1)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_weights_that_are_not_positive_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="are not all positive"):
        Blend(weights)


def test_weights_with_too_many_digits_are_refused_with_a_way_out() -> None:
    with pytest.raises(DataError, match="repeat only after") as error:
        Blend([1, 1 / 3])
    assert error.value.hint == "round them to three digits"
    assert Blend([1, 0.333, 0.125]).period < MAX_PERIOD
