"""Accuracy with its interval, and format, from the answers of one model."""

from collections.abc import Callable, Sequence
from typing import Any

from components.eval.answers import Answered
from components.eval.problems import SPLITS
from components.eval.statistics import interval, pass_at_1

WAYS = {"on": ("on", "plain"), "off": ("off",)}
"""What counts under which mode in reports: a base model writes its steps out, so its own way counts as thinking."""


def scores(rows: Sequence[Answered]) -> dict[str, Any]:
    """Accuracy and interval by split and mode, format by mode, and answers counted; None where there are none.

    Args:
        rows: all answers of one model.
    """

    def by_split(number: Callable[[Sequence[Answered]], Any]) -> dict[str, Any]:
        chosen = {split: [row for row in rows if row.split == split] for split in SPLITS}
        return {split: {mode: number(_of(found, mode)) for mode in WAYS} for split, found in chosen.items()}

    return {
        "accuracy": by_split(_accuracy),
        "interval": by_split(_interval),
        "format": {mode: _format(_of(rows, mode)) for mode in WAYS},
        "answers": by_split(_count),
    }


def _of(rows: Sequence[Answered], mode: str) -> list[Answered]:
    return [row for row in rows if row.mode in WAYS[mode]]


def _accuracy(rows: Sequence[Answered]) -> float | None:
    return pass_at_1([row.correct for row in rows]) if rows else None


def _interval(rows: Sequence[Answered]) -> list[float] | None:
    return list(interval([row.correct for row in rows])) if rows else None


def _format(rows: Sequence[Answered]) -> float | None:
    checkpoint = [ok for row in rows for ok in row.kept_format or ()]
    return sum(checkpoint) / len(checkpoint) if checkpoint else None


def _count(rows: Sequence[Answered]) -> int | None:
    return sum(len(row.samples) for row in rows) or None
