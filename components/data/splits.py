"""Which of a user's rows are held out: by a hash of what they ask, however often and in whatever form it is asked."""

import hashlib
from collections.abc import Callable, Iterable, Sequence, Set

from components.core.text.jsonl import Row

VALIDATION, TEST = 0, 8
"""First byte of the part of a question's hash that decides on each kind of holding out."""


def identity(question: str) -> bytes:
    """Names a question; white space makes no difference."""
    return hashlib.sha256(" ".join(question.split()).encode()).digest()


def hold_out(questions: Iterable[bytes], share: float, purpose: int) -> set[bytes]:
    """About `share` of the distinct questions: at least one and not all, where there are two or more."""
    ranked = sorted((question[purpose : purpose + 8], question) for question in set(questions))
    limit = int(share * 2**64).to_bytes(8, "big")
    count = sum(rank < limit for rank, _ in ranked)
    return {question for _, question in ranked[: max(0, min(max(1, count), len(ranked) - 1))]}


def hardest_levels(rows: Iterable[Row]) -> set[object]:
    """The top third of the distinct levels, at least one; none where all rows have the same."""
    levels = sorted({int(str(row["level"])) for row in rows})
    return set(levels[-max(1, len(levels) // 3) :]) if len(levels) > 1 else set()


def split_problems(rows: Sequence[Row], validation_fraction: float, test_fraction: float) -> dict[str, list[Row]]:
    """Problems by split; those of the test that have one of the hardest levels are the hard test."""
    named = [(identity(str(row["question"])), row) for row in rows]
    hardest = hardest_levels(rows)
    validation = hold_out((name for name, _ in named), validation_fraction, VALIDATION)
    test: set[bytes] = set()
    for hard in (False, True):  # apart, so that neither test stays empty
        left = (name for name, row in named if name not in validation and (row["level"] in hardest) is hard)
        test |= hold_out(left, test_fraction, TEST)
    splits: dict[str, list[Row]] = {split: [] for split in ("train", "validation", "test-standard", "test-hard")}
    for name, row in named:
        tested = "test-hard" if row["level"] in hardest else "test-standard"
        splits["validation" if name in validation else tested if name in test else "train"].append(row)
    return splits


def split_rows(
    rows: Sequence[Row], questions: Callable[[Row], Sequence[str]], share: float, held: Set[bytes]
) -> dict[str, list[Row]]:
    """Rows for training and for validation.

    Args:
        rows: chats, or documents of a corpus.
        questions: what a row asks; the first counts for the share.
        share: of the first questions, held out for validation.
        held: questions that nothing in training may ask: those of held-out problems.
    """
    asked = [list(map(identity, questions(row))) for row in rows]
    away = held | hold_out((names[0] for names in asked if held.isdisjoint(names)), share, VALIDATION)
    splits: dict[str, list[Row]] = {"train": [], "validation": []}
    for names, row in zip(asked, rows, strict=True):
        splits["train" if away.isdisjoint(names) else "validation"].append(row)
    return splits
