"""Splits a user's rows by a hash of the question, so that rows with nearly the same question are in the same split."""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence, Set

from components.core.text.row_files import Row

VALIDATION, TEST = 0, 8
"""First of the eight bytes of a question's hash that decide whether it is held out for this split."""


PUNCTUATION = dict.fromkeys(map(ord, ".,;:!?\"'`\u2018\u2019\u201c\u201d\u2026"))
"""Marks that make no difference between two questions; operators such as + and - do."""


def normalised(text: str) -> str:
    """A text without what near duplicates differ in: case, punctuation, white space, and variants of a character."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(plain.casefold().translate(PUNCTUATION).split())


def question_digest(question: str) -> bytes:
    """Hash of a question; near duplicates have the same one."""
    return hashlib.sha256((normalised(question) or question).encode()).digest()


def hold_out(questions: Iterable[bytes], fraction: float, first_byte: int) -> set[bytes]:
    """About `fraction` of the distinct questions: where there are two or more, at least one and not all."""
    ranked = sorted((question[first_byte : first_byte + 8], question) for question in set(questions))
    limit = int(fraction * 2**64).to_bytes(8, "big")
    count = sum(rank < limit for rank, _ in ranked)
    return {question for _, question in ranked[: max(0, min(max(1, count), len(ranked) - 1))]}


def hardest_levels(rows: Iterable[Row]) -> set[object]:
    """The top third of the distinct levels, at least one; empty where all rows have the same level."""
    levels = sorted({int(str(row["level"])) for row in rows})
    return set(levels[-max(1, len(levels) // 3) :]) if len(levels) > 1 else set()


def split_problems(rows: Sequence[Row], validation_fraction: float, test_fraction: float) -> dict[str, list[Row]]:
    """Problems by split; test problems of the hardest levels form the split `test-hard`."""
    named = [(question_digest(str(row["question"])), row) for row in rows]
    hardest = hardest_levels(rows)
    validation = hold_out((name for name, _ in named), validation_fraction, VALIDATION)
    test: set[bytes] = set()
    for hard in (False, True):  # drawn separately, so that neither test split stays empty
        left = (name for name, row in named if name not in validation and (row["level"] in hardest) is hard)
        test |= hold_out(left, test_fraction, TEST)
    splits: dict[str, list[Row]] = {split: [] for split in ("train", "validation", "test-standard", "test-hard")}
    for name, row in named:
        tested = "test-hard" if row["level"] in hardest else "test-standard"
        splits["validation" if name in validation else tested if name in test else "train"].append(row)
    return splits


def split_chats(
    rows: Sequence[Row], questions: Callable[[Row], Sequence[str]], fraction: float, held_out: Set[bytes]
) -> dict[str, list[Row]]:
    """Split rows into training and validation.

    Args:
        rows: chats.
        questions: the questions of a row; the first decides the split.
        fraction: of the distinct first questions, held out for validation.
        held_out: hashes of questions that must not be in training: those of held-out problems.
    """
    asked = [list(map(question_digest, questions(row))) for row in rows]
    excluded = held_out | hold_out((names[0] for names in asked if held_out.isdisjoint(names)), fraction, VALIDATION)
    splits: dict[str, list[Row]] = {"train": [], "validation": []}
    for names, row in zip(asked, rows, strict=True):
        splits["train" if excluded.isdisjoint(names) else "validation"].append(row)
    return splits
