"""The answers of an evaluation, one row per problem and prompt mode, from which all scores can be computed again."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from components.core.base.config import Config

PromptMode = Literal["on", "off", "plain"]
"""A chat with thinking on or off; for a base model, a completion of the plain prompt."""


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
    """Whether each answer is correct."""
    format_ok: tuple[bool, ...] | None
    """Whether each answer has the format of its mode; None for a base model, which has no format."""


def write_answers(path: Path, rows: Iterable[AnswerRow]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")


def read_answers(path: Path) -> list[AnswerRow]:
    """Read what `write_answers` wrote."""
    return [AnswerRow.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
