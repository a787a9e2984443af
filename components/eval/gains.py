"""Gains: the accuracy of a model over that of another one, or of another mode, on the same problems.

Both sides answer the same problems, and a hard problem is hard for both. So differences are taken problem by problem,
which leaves far less noise than the difference of two accuracies with an interval each.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.core.base.normal_distribution import quantile
from components.eval.answer_rows import SPLITS, AnswerRow
from components.eval.scores import PROMPT_MODES

CONFIDENCE = 0.95
"""Confidence of intervals, where no other is asked for."""


@dataclass(frozen=True)
class Gain:
    """A paired comparison of accuracies.

    Attributes:
        base: mean of the base.
        value: mean difference over the problems.
        interval: confidence interval of the difference.
        ratio: accuracy as a multiple of the base's; None where the base solves nothing.
        ratio_interval: confidence interval of the ratio.
        problems: number of problems that both sides answered.
    """

    base: float
    value: float
    interval: tuple[float, float]
    ratio: float | None
    ratio_interval: tuple[float, float]
    problems: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]], confidence: float = CONFIDENCE) -> "Gain":
        """Compare the fractions of correct answers to each problem: (of the base, of the other).

        The interval of the ratio is that of the logarithm of the ratio of means (delta method), with the variance
        between problems and the two added pairs of `paired_interval`.
        """
        z = quantile(confidence)
        added = [*pairs, (0.0, 1.0), (1.0, 0.0)]
        base, other = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        low, high = paired_interval([b - a for a, b in pairs], confidence)
        added_base, added_other = (sum(side) / len(added) for side in zip(*added, strict=True))
        ratio = added_other / added_base
        factor = math.exp(z * _standard_error([b - ratio * a for a, b in added]) / added_other)
        return cls(
            base=base,
            value=other - base,
            interval=(max(-1.0, low), min(1.0, high)),
            ratio=other / base if base else None,
            ratio_interval=(ratio / factor, ratio * factor),
            problems=len(pairs),
        )

    def as_json(self) -> dict[str, Any]:
        """For `metrics.json`: `low` and `high` are the bounds of the interval."""
        (low, high), (ratio_low, ratio_high) = self.interval, self.ratio_interval
        return {
            "value": self.value,
            "low": low,
            "high": high,
            "ratio": self.ratio,
            "ratio_low": ratio_low,
            "ratio_high": ratio_high,
            "problems": self.problems,
        }


def paired_interval(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """Confidence interval of the mean of paired differences of numbers between 0 and 1, by their variance.

    Two pairs that differ by 1 in either direction are added: so the width is right where all differences are 0 and
    where pairs are few, where it would be 0 or far too small.

    Source: Bonett and Price, Journal of Educational and Behavioral Statistics 37 (2012), for one answer a problem.
    """
    added = [*differences, 1.0, -1.0]
    centre = sum(added) / len(added)
    half = quantile(confidence) * _standard_error([difference - centre for difference in added])
    return centre - half, centre + half


def gains(answers: Mapping[str, Sequence[AnswerRow]]) -> dict[str, dict[str, Any]]:
    """Gains of each model: `thinking` on over off, by split; `over` earlier models, by their name, split and mode.

    Args:
        answers: of each model in the order of the pipeline.

    Returns:
        Gains over the first model and over the one before; None where no problem was answered on both sides.
    """
    names = list(answers)

    def gain(base: Sequence[AnswerRow], base_mode: str, other: Sequence[AnswerRow], mode: str, split: str) -> Any:
        found = paired_gain(select(base, split, base_mode), select(other, split, mode), correctness)
        return None if found is None else found.as_json()

    return {
        name: {
            "thinking": {split: gain(own, "off", own, "on", split) for split in SPLITS},
            "over": {
                base: {
                    split: {mode: gain(answers[base], mode, own, mode, split) for mode in PROMPT_MODES}
                    for split in SPLITS
                }
                for base in dict.fromkeys([*names[:1], *names[max(0, place - 1) : place]])
                if base != name
            },
        }
        for place, (name, own) in enumerate(answers.items())
    }


def paired_gain(
    base: Sequence[AnswerRow],
    other: Sequence[AnswerRow],
    marks: Callable[[AnswerRow], Sequence[bool]],
    confidence: float = CONFIDENCE,
) -> Gain | None:
    """Compare two models, or two modes of one, on the problems that both were asked; None without any.

    A problem is the same where its split, id, question and correct answer are: the rows may be of two evaluations.

    Args:
        base: answers of one side.
        other: answers of the other side.
        marks: what is compared, for each sampled answer of a row; a row without marks is left out.
        confidence: of the intervals.
    """
    fractions, other_fractions = (_fractions(rows, marks) for rows in (base, other))
    pairs = [(fractions[problem], other_fractions[problem]) for problem in fractions if problem in other_fractions]
    return Gain.of(pairs, confidence) if pairs else None


def correctness(row: AnswerRow) -> Sequence[bool]:
    """Whether each sampled answer is correct."""
    return row.correct


def values_and_bounds(found: Mapping[str, Any]) -> dict[str, Any]:
    """Gains with their value and its interval alone, without those that were not measured: for live metrics."""
    if "value" in found:
        return {name: found[name] for name in ("value", "low", "high")}
    inner = {name: values_and_bounds(part) for name, part in found.items() if part is not None}
    return {name: part for name, part in inner.items() if part}


def select(rows: Sequence[AnswerRow], split: str, mode: str) -> list[AnswerRow]:
    """Rows of a split, with thinking on or off."""
    return [row for row in rows if row.split == split and row.mode in PROMPT_MODES[mode]]


def _fractions(
    rows: Sequence[AnswerRow], marks: Callable[[AnswerRow], Sequence[bool]]
) -> dict[tuple[str, str, str, str], float]:
    """Fraction of true marks by problem; modes count equally where a problem was asked in several."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        if own := marks(row):
            found.setdefault((row.split, row.id, row.question, row.expected), []).append(sum(own) / len(own))
    return {problem: statistics.fmean(values) for problem, values in found.items()}


def _standard_error(residuals: Sequence[float]) -> float:
    """Of a mean, from the residuals."""
    return math.sqrt(sum(residual**2 for residual in residuals)) / len(residuals)
