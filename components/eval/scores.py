"""Accuracy with its confidence interval, and format, from the answers of one model."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from components.core.base.normal_distribution import Z_95
from components.eval.answer_rows import SPLITS, AnswerRow

PROMPT_MODES = {"on": ("on", "chat", "plain"), "off": ("off",)}
"""Prompt modes that count as thinking on or off in reports. A model without the switch may write its steps out."""


def scores(rows: Sequence[AnswerRow]) -> dict[str, Any]:
    """Accuracy, score, interval and number of answers by split and mode, and format by mode; None without answers.

    The score differs from the accuracy where verifiers give a part of it to answers that are not correct.

    Args:
        rows: all answers of one model.
    """

    def by_split(number: Callable[[Sequence[AnswerRow]], Any]) -> dict[str, Any]:
        rows_of = {split: [row for row in rows if row.split == split] for split in SPLITS}
        return {
            split: {mode: number(_in_mode(found, mode)) for mode in PROMPT_MODES} for split, found in rows_of.items()
        }

    return {
        "accuracy": by_split(_accuracy),
        "score": by_split(_score),
        "interval": by_split(_interval),
        "format": {mode: _format(_in_mode(rows, mode)) for mode in PROMPT_MODES},
        "answers": by_split(_count),
    }


def _in_mode(rows: Sequence[AnswerRow], mode: str) -> list[AnswerRow]:
    return [row for row in rows if row.mode in PROMPT_MODES[mode]]


def _accuracy(rows: Sequence[AnswerRow]) -> float | None:
    return pass_at_1([row.correct for row in rows]) if rows else None


def _score(rows: Sequence[AnswerRow]) -> float | None:
    scored = [row.correct if row.scores is None else row.scores for row in rows]
    return sum(sum(answers) / len(answers) for answers in scored) / len(scored) if scored else None


def _interval(rows: Sequence[AnswerRow]) -> list[float] | None:
    return list(interval([row.correct for row in rows])) if rows else None


def _format(rows: Sequence[AnswerRow]) -> float | None:
    checks = [ok for row in rows for ok in row.format_ok or ()]
    return sum(checks) / len(checks) if checks else None


def _count(rows: Sequence[AnswerRow]) -> int | None:
    return sum(len(row.samples) for row in rows) or None


def pass_at_1(correct: Sequence[Sequence[bool]]) -> float:
    """Fraction of correct answers, problems weighted equally.

    Args:
        correct: for each problem, whether each of its sampled answers is correct.
    """
    return sum(sum(answers) / len(answers) for answers in correct) / len(correct)


def interval(correct: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % Wilson score interval of pass@1, with the effective number of independent answers.

    Answers to one problem are correlated, so their number is divided by the design effect: the variance between
    problems over the variance that independent answers would have. It lies between the number of problems and the
    number of answers. Wilson's interval stays inside [0, 1], and its width is not zero if all answers are correct.
    """
    p = pass_at_1(correct)
    independent = effective_number(correct)
    centre = (p + Z_95**2 / (2 * independent)) / (1 + Z_95**2 / independent)
    half = Z_95 / (1 + Z_95**2 / independent)
    half *= math.sqrt(p * (1 - p) / independent + Z_95**2 / (4 * independent**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def effective_number(correct: Sequence[Sequence[bool]]) -> float:
    """Number of independent answers with the same variance. Source: Kish, Survey Sampling (1965), section 5.4."""
    problems, p = len(correct), pass_at_1(correct)
    answers = sum(len(sampled) for sampled in correct)
    if problems < 2 or not 0 < p < 1:
        return float(problems)
    variance = sum((sum(s) / len(s) - p) ** 2 for s in correct) / (problems - 1) / problems
    if variance == 0:
        return float(answers)
    return min(float(answers), max(float(problems), p * (1 - p) / variance))
