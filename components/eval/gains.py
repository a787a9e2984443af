"""Gains: the accuracy of a model over that of another one, or of another mode, on the same problems.

Both sides answer the same problems, and a hard problem is hard for both. So differences are taken problem by problem,
which leaves far less noise than the difference of two accuracies with an interval each.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.eval.answers import SPLITS, AnswerRow
from components.eval.scores import PROMPT_MODES, Z_95


@dataclass(frozen=True)
class Gain:
    """A paired comparison of accuracies.

    Attributes:
        value: mean difference over the problems.
        interval: 95 % confidence interval of the difference.
        ratio: accuracy as a multiple of the base's; None where the base solves nothing.
        ratio_interval: 95 % confidence interval of the ratio.
        problems: number of problems that both sides answered.
    """

    value: float
    interval: tuple[float, float]
    ratio: float | None
    ratio_interval: tuple[float, float]
    problems: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> "Gain":
        """Compare the fractions of correct answers to each problem: (of the base, of the other).

        The intervals are those of the mean and of the logarithm of the ratio of means (delta method), with the variance
        between problems, after two problems are added that one side alone solves each. So the width is right where all
        differences are 0 and where problems are few: without these two it would be 0 or far too small.

        Source: Bonett and Price, Journal of Educational and Behavioral Statistics 37 (2012), for one answer a problem.
        """
        added = [*pairs, (0.0, 1.0), (1.0, 0.0)]
        base, other = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        differences = [b - a for a, b in added]
        centre = sum(differences) / len(added)
        half = Z_95 * _standard_error([difference - centre for difference in differences])
        added_base, added_other = (sum(side) / len(added) for side in zip(*added, strict=True))
        ratio = added_other / added_base
        factor = math.exp(Z_95 * _standard_error([b - ratio * a for a, b in added]) / added_other)
        return cls(
            value=other - base,
            interval=(max(-1.0, centre - half), min(1.0, centre + half)),
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


def gains(answers: Mapping[str, Sequence[AnswerRow]]) -> dict[str, dict[str, Any]]:
    """Gains of each model: `thinking` on over off, by split; `over` earlier models, by their name, split and mode.

    Args:
        answers: of each model in the order of the pipeline.

    Returns:
        Gains over the first model and over the one before; None where no problem was answered on both sides.
    """
    fractions = {name: _fractions(rows) for name, rows in answers.items()}
    names = list(fractions)
    return {
        name: {
            "thinking": {split: _gain(own[split, "off"], own[split, "on"]) for split in SPLITS},
            "over": {
                base: {
                    split: {mode: _gain(fractions[base][split, mode], own[split, mode]) for mode in PROMPT_MODES}
                    for split in SPLITS
                }
                for base in dict.fromkeys([*names[:1], *names[max(0, place - 1) : place]])
                if base != name
            },
        }
        for place, (name, own) in enumerate(fractions.items())
    }


def values_and_bounds(found: Mapping[str, Any]) -> dict[str, Any]:
    """Gains with their value and its interval alone, without those that were not measured: for live metrics."""
    if "value" in found:
        return {name: found[name] for name in ("value", "low", "high")}
    inner = {name: values_and_bounds(part) for name, part in found.items() if part is not None}
    return {name: part for name, part in inner.items() if part}


def _fractions(rows: Sequence[AnswerRow]) -> dict[tuple[str, str], dict[str, float]]:
    """By split and mode, the fraction of correct answers to each problem."""
    return {
        (split, mode): {
            row.id: sum(row.correct) / len(row.correct)
            for row in rows
            if row.split == split and row.mode in PROMPT_MODES[mode] and row.correct
        }
        for split in SPLITS
        for mode in PROMPT_MODES
    }


def _gain(base: Mapping[str, float], other: Mapping[str, float]) -> dict[str, Any] | None:
    """The gain on the problems that both sides answered."""
    pairs = [(base[problem], other[problem]) for problem in base if problem in other]
    return Gain.of(pairs).as_json() if pairs else None


def _standard_error(residuals: Sequence[float]) -> float:
    """Of a mean, from the residuals."""
    return math.sqrt(sum(residual**2 for residual in residuals)) / len(residuals)
