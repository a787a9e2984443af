"""Accuracy with its confidence interval, and format, from the answers of one model."""

from collections.abc import Callable, Sequence
from typing import Any

from components.eval.answers import AnswerRow
from components.eval.problems import SPLITS
from components.eval.statistics import interval, pass_at_1

PROMPT_MODES = {"on": ("on", "plain"), "off": ("off",)}
"""Prompt modes that count as thinking on or off in reports. A base model writes its steps out, which is thinking."""


def scores(rows: Sequence[AnswerRow]) -> dict[str, Any]:
    """Accuracy, interval and number of answers by split and mode, and format by mode; None without answers.

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
        "interval": by_split(_interval),
        "format": {mode: _format(_in_mode(rows, mode)) for mode in PROMPT_MODES},
        "answers": by_split(_count),
    }


def _in_mode(rows: Sequence[AnswerRow], mode: str) -> list[AnswerRow]:
    return [row for row in rows if row.mode in PROMPT_MODES[mode]]


def _accuracy(rows: Sequence[AnswerRow]) -> float | None:
    return pass_at_1([row.correct for row in rows]) if rows else None


def _interval(rows: Sequence[AnswerRow]) -> list[float] | None:
    return list(interval([row.correct for row in rows])) if rows else None


def _format(rows: Sequence[AnswerRow]) -> float | None:
    checks = [ok for row in rows for ok in row.format_ok or ()]
    return sum(checks) / len(checks) if checks else None


def _count(rows: Sequence[AnswerRow]) -> int | None:
    return sum(len(row.samples) for row in rows) or None
