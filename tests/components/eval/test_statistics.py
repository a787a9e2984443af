import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.eval.statistics import effective_number, interval, pass_at_1

RIGHT = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=30)


def single(right: int, wrong: int) -> list[list[bool]]:
    """One answer to each problem."""
    return [[True]] * right + [[False]] * wrong


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # R: prop.test(right, total, correct = FALSE)
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (81, 263, 0.2552966, 0.3662128),
        (15, 148, 0.0623863, 0.1605399),
        (1, 29, 0.0061130, 0.1717552),
    ],
)
def test_interval_of_single_answers_is_wilsons(right, total, low, high):
    assert interval(single(right, total - right)) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("right", "wrong"), [(3, 7), (1, 29), (50, 50)])
def test_ends_of_the_interval_are_where_the_score_test_turns(right, wrong):
    """Wilson's interval holds the shares that a score test at 5 % does not reject: found by trying all of them."""
    n, p = right + wrong, right / (right + wrong)
    checkpoint = [
        q / 100000 for q in range(1, 100000) if abs(p - q / 100000) <= 1.959964 * math.sqrt(q / 1e5 * (1 - q / 1e5) / n)
    ]

    assert interval(single(right, wrong)) == pytest.approx((checkpoint[0], checkpoint[-1]), abs=2e-5)


@settings(max_examples=40)
@given(RIGHT)
def test_the_interval_holds_the_share_and_stays_between_0_and_1(right):
    low, high = interval(right)

    assert 0 <= low <= pass_at_1(right) + 1e-12
    assert pass_at_1(right) - 1e-12 <= high <= 1
    assert high - low > 0


@settings(max_examples=40)
@given(RIGHT)
def test_the_effective_number_lies_between_problems_and_answers(right):
    assert len(right) <= effective_number(right) <= sum(map(len, right))


@settings(max_examples=40)
@given(RIGHT, st.randoms())
def test_order_of_problems_and_answers_does_not_matter(right, generator: random.Random):
    mixed = [generator.sample(answers, len(answers)) for answers in generator.sample(right, len(right))]

    assert pass_at_1(mixed) == pytest.approx(pass_at_1(right))
    assert interval(mixed) == pytest.approx(interval(right))


def test_answers_that_always_agree_count_once_a_problem():
    once, often = [[True]] * 30 + [[False]] * 10, [[True] * 8] * 30 + [[False] * 8] * 10

    assert effective_number(often) == 40
    assert interval(often) == pytest.approx(interval(once))


def test_answers_that_differ_within_problems_alone_all_count():
    assert effective_number([[True, False]] * 20) == 40


def test_the_effective_number_explains_the_spread_of_repeated_experiments():
    """Variance of pass@1 over many simulated evaluations is p(1 - p) over the effective number."""
    generator = random.Random(0)

    def evaluation() -> list[list[bool]]:
        ability = [generator.choice([0.2, 0.8]) for _ in range(100)]
        return [[generator.random() < each for _ in range(4)] for each in ability]

    found = [evaluation() for _ in range(400)]
    means = [pass_at_1(each) for each in found]
    mean = sum(means) / len(means)
    variance = sum((each - mean) ** 2 for each in means) / len(means)
    expected = sum(effective_number(each) for each in found) / len(found)

    assert mean * (1 - mean) / variance == pytest.approx(expected, rel=0.2)


def test_problems_weigh_the_same_however_often_they_are_answered():
    assert pass_at_1([[True, True, True], [False]]) == 0.5
