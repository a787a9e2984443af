"""Problems with answers that can be verified."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.core.text.chat import plain_answer
from components.core.text.jsonl import read_user_rows
from components.core.text.row_files import Row
from components.core.text.verifier import verify


@dataclass(frozen=True)
class Problem:
    """A problem of one split."""

    split: str
    number: int
    """Index in its split; sampling takes its seed from it, so that every model gets the same seed."""
    id: str
    question: str
    """Text of the user message in a chat."""
    prompt: str
    """Text that a base model completes."""
    answer: str

    def is_completed_by(self, text: str) -> bool:
        """Whether the completion by a base model ends with the right answer."""
        return verify(plain_answer(text), self.answer)


def read_problems(path: Path, split: str, limit: int) -> list[Problem]:
    """The first `limit` problems of a JSONL file; none where there is no such file.

    Raises:
        DataError: a row lacks a field.
    """
    rows = read_user_rows([path], _whole, skip_bad=False)[0] if path.is_file() else []
    return [Problem(split, number, *_fields(row)) for number, row in enumerate(with_distinct_ids(rows[:limit]))]


def with_distinct_ids(rows: Sequence[Row]) -> list[Row]:
    """The rows, with a number behind each id that an earlier row has: different problems are never taken for one."""
    taken = {str(row["id"]) for row in rows}
    first: set[str] = set()
    distinct = []
    for row in rows:
        identity, copies = str(row["id"]), 1
        if identity in first:
            while (identity := f"{row['id']}#{(copies := copies + 1)}") in taken:
                pass
            taken.add(identity)
        first.add(identity)
        distinct.append({**row, "id": identity})
    return distinct


def _whole(row: Row) -> Row:
    """The row, which has all fields."""
    _fields(row)
    return row


def _fields(row: Row) -> tuple[str, str, str, str]:
    return str(row["id"]), str(row["question"]), str(row["prompt"]), str(row["answer"])
