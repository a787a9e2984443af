"""Paired gains: by hand, at the edges, and their intervals against a truth that is known by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.eval.answer_rows import AnswerRow, PromptMode
from components.eval.gains import Gain, gains, values_and_bounds

FRACTIONS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def answer_row(problem: str, mode: PromptMode, *correct: bool, split: str = "hard") -> AnswerRow:
    common = {"model": "m", "question": "2+2=", "expected": "4", "samples": ("x",) * len(correct)}
    return AnswerRow(split=split, mode=mode, id=problem, correct=correct, format_ok=None, **common)


def test_a_gain_is_the_mean_difference_and_its_interval_that_of_bonett_and_price():
    """Of 20 problems both solve 8, the base alone 2, the other alone 6: worked out with the published formula."""
    gain = Gain.of([(1, 1)] * 8 + [(1, 0)] * 2 + [(0, 1)] * 6 + [(0, 0)] * 4)
    p12, p21 = (6 + 1) / 22, (2 + 1) / 22
    half = 1.959963984540054 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 22)

    assert (gain.value, gain.ratio) == pytest.approx((0.2, 1.4))
    assert gain.problems == 20
    assert gain.interval == pytest.approx((p12 - p21 - half, p12 - p21 + half))


@pytest.mark.parametrize("solved", [0.0, 1.0])
def test_equal_answers_to_a_few_problems_do_not_prove_that_models_are_equal(solved):
    few, many = (Gain.of([(solved, solved)] * number) for number in (10, 1000))

    assert few.value == many.value == 0
    assert few.interval == pytest.approx((-0.231, 0.231), abs=1e-3)
    assert many.interval == pytest.approx((-0.0028, 0.0028), abs=1e-4)
    assert few.ratio == (1.0 if solved else None)
    assert few.ratio_interval[0] < 1 < few.ratio_interval[1]


@given(st.lists(st.tuples(FRACTIONS, FRACTIONS), min_size=1, max_size=30))
def test_an_interval_contains_its_value_and_is_possible(pairs):
    gain = Gain.of(pairs)
    low, high = gain.interval

    assert -1 <= low <= gain.value <= high <= 1
    assert (Gain.of([(b, a) for a, b in pairs]).interval) == pytest.approx((-high, -low))


@pytest.mark.parametrize("problems", [10, 40, 250])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(("base_logit", "gain_logit"), [(0.0, 0.5), (0.0, 0.0), (3.0, 0.5), (-3.0, 1.0)])
def test_the_interval_covers_the_truth_in_95_of_100_evaluations(problems, samples, base_logit, gain_logit):
    """Problems differ in difficulty; every evaluation draws problems and answers anew."""
    rng = np.random.default_rng(0)
    ease = 2 * rng.normal(size=20_000)
    chances = [1 / (1 + np.exp(-(ease + logit))) for logit in (base_logit, base_logit + gain_logit)]
    true_gain, true_ratio = chances[1].mean() - chances[0].mean(), chances[1].mean() / chances[0].mean()
    covered = []
    for _ in range(400):
        drawn = rng.integers(0, ease.size, problems)
        base, other = (rng.binomial(samples, chance[drawn]) / samples for chance in chances)
        gain = Gain.of(list(zip(base.tolist(), other.tolist(), strict=True)))
        bounds = ((gain.interval, true_gain), (gain.ratio_interval, true_ratio))
        covered.append([low <= truth <= high for (low, high), truth in bounds])

    assert np.mean(covered, axis=0).min() >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400)


def test_answers_are_paired_by_problem_split_and_mode():
    sft = [answer_row("a", "on", True), answer_row("b", "on", False), answer_row("a", "off", False)]
    rl = [answer_row("b", "on", True, True, False, True), answer_row("a", "on", True), answer_row("c", "on", False)]
    found = gains({"sft": sft, "rl": [*rl, answer_row("a", "on", False, split="standard")]})

    over_sft = found["rl"]["over"]["sft"]
    assert (over_sft["hard"]["on"]["value"], over_sft["hard"]["on"]["problems"]) == (0.375, 2)  # c has no partner
    assert over_sft["hard"]["off"] is over_sft["standard"]["on"] is None
    assert (found["sft"]["thinking"]["hard"]["value"], found["sft"]["thinking"]["hard"]["problems"]) == (1.0, 1)
    assert found["sft"]["over"] == {}


def test_a_model_is_compared_with_the_first_and_with_the_one_before():
    answers = [answer_row("a", "plain", True)], [answer_row("a", "on", False)]
    found = gains({"parent": answers[0], "child": answers[0], "sft": answers[1], "rl": answers[1]})

    assert {name: list(gain["over"]) for name, gain in found.items()} == {
        "parent": [],
        "child": ["parent"],
        "sft": ["parent", "child"],
        "rl": ["parent", "sft"],
    }
    assert found["sft"]["over"]["parent"]["hard"]["on"]["value"] == -1  # a plain answer counts as thinking on


def test_live_metrics_have_the_measured_gains_with_their_bounds():
    answers = [answer_row("a", "on", True), answer_row("b", "on", False)]
    found = gains({"sft": answers, "rl": answers[:1]})
    low, high = Gain.of([(1.0, 1.0)]).interval

    assert values_and_bounds(found) == {
        "rl": {"over": {"sft": {"hard": {"on": {"value": 0.0, "low": low, "high": high}}}}}
    }
