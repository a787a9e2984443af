"""The problems that models are asked."""

from dataclasses import dataclass
from pathlib import Path

from components.core.errors import DataError
from components.core.rows import Row, read_user_rows

SPLITS = ("standard", "hard")


@dataclass(frozen=True)
class Problem:
    """A problem of one split."""

    split: str
    number: int
    """Place in its split; decides the seed, so that every model meets the problem with the same one."""
    id: str
    question: str
    """What goes into a chat."""
    prompt: str
    """What a base model is to complete."""
    answer: str


def load_problems(folder: Path, limit: int) -> list[Problem]:
    """The first `limit` problems of each split that is there.

    Raises:
        DataError: there are none, or a row lacks a field.
    """
    found: list[Problem] = []
    for split in SPLITS:
        file = folder / f"test-{split}.jsonl"
        rows = read_user_rows([file], _fields, skip_bad=False)[0] if file.is_file() else []
        found += [Problem(split, number, *fields) for number, fields in enumerate(rows[:limit])]
    if not found:
        raise DataError("there are no test problems", hint="give the recipe `rl:` problems with answers")
    return found


def _fields(row: Row) -> tuple[str, str, str, str]:
    return str(row["id"]), str(row["question"]), str(row["prompt"]), str(row["answer"])
