"""The verdict on a canary as a law of chance: which versions are refused how often, over many seeds."""

import random
from dataclasses import replace

import pytest

from components.eval.gains import paired_interval
from components.eval.paired_verdict import CONFIDENCE, Pair, Reply, compare

QUESTIONS, TOLERANCE = 200, 0.02
GOOD = Reply(correct=True, format_ok=True, thinking=100)


def replies(draw: random.Random, *, errors: float = 0.0, accuracy: float = 0.8, length: float = 100.0) -> list[Reply]:
    """Replies with thinking on and off; a wrong answer by chance, thinking of a random length."""
    made = []
    for mode in ("on", "off"):
        if draw.random() < errors:
            made.append(Reply(failed=True, correct=False))
        else:
            thinking = round(draw.expovariate(1 / length)) if mode == "on" else None
            made.append(replace(GOOD, correct=draw.random() < accuracy, thinking=thinking))
    return made


def worse(seed: int, **canary: float) -> set[str]:
    """By which numbers a canary is refused that differs from the stable version as the arguments say."""
    draw = random.Random(seed)
    pairs: list[Pair] = [(replies(draw), replies(draw, **canary)) for _ in range(QUESTIONS)]
    return {found.name for found in compare(pairs, TOLERANCE) if found.is_worse}


def test_a_version_that_fails_one_request_in_ten_is_always_refused() -> None:
    assert all("failed" in worse(seed, errors=0.1) for seed in range(200))


def test_an_equal_version_passes_although_its_answers_differ_by_chance() -> None:
    refused = sum(bool(worse(seed)) for seed in range(200))
    assert refused <= 4  # five intervals of 99 %, each of which errs in the bad direction in 0.5 to 1 % of all cases


def test_a_version_that_solves_far_less_or_thinks_three_times_as_long_is_refused() -> None:
    assert sum("correct" in worse(seed, accuracy=0.6) for seed in range(50)) == 50
    assert sum("thinking, characters" in worse(seed, length=300.0) for seed in range(50)) == 50
    assert sum("thinking, characters" in worse(seed, length=30.0) for seed in range(50)) == 50


def test_a_better_version_passes() -> None:
    assert sum(bool(worse(seed, accuracy=0.95)) for seed in range(50)) <= 1


def test_a_difference_within_the_tolerance_passes_however_sure_it_is() -> None:
    stable = [[GOOD]] * 20_000
    canary = [[replace(GOOD, cut_off=True)]] * 300 + [[GOOD]] * 19_700
    pairs = list(zip(stable, canary, strict=True))
    (found,) = (each for each in compare(pairs, TOLERANCE) if each.name == "cut off")
    assert found.interval[0] > 0
    assert not found.is_worse
    assert {each.name for each in compare(pairs, 0.01) if each.is_worse} == {"cut off"}


def test_the_interval_is_the_hand_computed_one() -> None:
    # 98 equal pairs and the two added ones: variance 2 / 100, standard error sqrt(2) / 100
    assert paired_interval([0.0] * 98, CONFIDENCE) == pytest.approx(
        (-2.5758293 * 2**0.5 / 100, 2.5758293 * 2**0.5 / 100)
    )


def test_an_interval_holds_the_true_difference_in_99_of_100_cases() -> None:
    held = 0
    for seed in range(500):
        draw = random.Random(seed)
        differences = [float(draw.random() < 0.7) - float(draw.random() < 0.8) for _ in range(QUESTIONS)]
        low, high = paired_interval(differences, CONFIDENCE)
        held += low <= -0.1 <= high
    assert held >= 485


def test_a_number_that_a_side_lacks_is_left_out() -> None:
    ungraded = replace(GOOD, correct=None)
    found = {each.name: each for each in compare([([GOOD], [ungraded]), ([GOOD], [GOOD])], TOLERANCE)}
    assert found["correct"].questions == 1
    assert found["in format"].questions == 2
    silent = compare([([Reply(failed=True)], [GOOD])], TOLERANCE)
    assert "thinking, characters" not in {each.name for each in silent}
