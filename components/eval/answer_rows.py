"""The answers of a model to test problems, as an evaluation records them. Needs no tokenizer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from components.core.base.config import Config

SPLITS = ("standard", "hard")


PromptMode = Literal["on", "off", "chat", "plain"]
"""A chat with thinking on or off; a chat with a model that has no switch, in its own template; for a base model, a
completion of the plain prompt."""


class AnswerRow(Config):
    """All answers of one model to one problem in one prompt mode."""

    model: str
    """Role of the model."""
    split: str
    """Test split of the problem."""
    mode: PromptMode
    """Prompt mode."""
    id: str
    """Id of the problem."""
    question: str
    """The question, without the chat template."""
    expected: str
    """The correct answer."""
    samples: tuple[str, ...]
    """The answers, with the reasoning between its tags."""
    correct: tuple[bool, ...]
    """Whether each answer is correct; empty where that cannot be decided."""
    scores: tuple[float, ...] | None = None
    """Score of each answer, 0 to 1, where the problem has a verifier; 1 is correct."""
    format_ok: tuple[bool, ...] | None
    """Whether each answer has the format of its mode; None for a model without the switch."""
    judge_error: str | None = None
    """Why the answers could not be graded; `correct` is empty then, and the problem counts for no model."""


def ungraded(rows: Iterable[AnswerRow]) -> dict[tuple[str, str], str]:
    """Problems, by split and id, with an answer that could not be graded, and why."""
    return {(row.split, row.id): row.judge_error for row in rows if row.judge_error is not None}


def write_answers(path: Path, rows: Iterable[AnswerRow]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")


def read_answers(path: Path) -> list[AnswerRow]:
    """Read what `write_answers` wrote."""
    return parse_answers(path.read_bytes())


def parse_answers(data: bytes) -> list[AnswerRow]:
    """The rows in the bytes of a file that `write_answers` wrote."""
    # `splitlines` of a text would also split at U+2028 inside an answer
    return [AnswerRow.model_validate_json(line) for line in data.splitlines() if line]
