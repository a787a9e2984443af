"""Problems whose answers can be checked, and what counts as a right answer of a base model."""

from dataclasses import dataclass
from pathlib import Path

from components.core.text.chat import plain_answer
from components.core.text.jsonl import Row, read_user_rows
from components.core.text.verifier import verify


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

    def is_completed_by(self, text: str) -> bool:
        """Whether a base model's completion of the prompt comes to the right answer."""
        return verify(plain_answer(text), self.answer)


def read_problems(path: Path, split: str, limit: int) -> list[Problem]:
    """The first `limit` problems of a JSONL file; none where there is no such file.

    Raises:
        DataError: a row lacks a field.
    """
    rows = read_user_rows([path], _fields, skip_bad=False)[0] if path.is_file() else []
    return [Problem(split, number, *fields) for number, fields in enumerate(rows[:limit])]


def _fields(row: Row) -> tuple[str, str, str, str]:
    return str(row["id"]), str(row["question"]), str(row["prompt"]), str(row["answer"])
