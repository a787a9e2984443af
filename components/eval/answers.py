"""Every answer of an evaluation, a row for each problem and way of asking, so that anyone can count again."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from components.core.base.config import Config

PromptMode = Literal["on", "off", "plain"]
"""Thinking on, thinking off, or a base model's own way: a completion of the plain prompt."""


class Answered(Config):
    """All answers of one model to one problem, asked in one way."""

    model: str
    """Role of the model."""
    split: str
    """Which test the problem is from."""
    mode: PromptMode
    """How it was asked."""
    id: str
    """The problem's own id."""
    question: str
    """What was asked, without the chat around it."""
    expected: str
    """The right answer."""
    samples: tuple[str, ...]
    """Answers as they came, reasoning between its tags."""
    correct: tuple[bool, ...]
    """Whether each is right."""
    kept_format: tuple[bool, ...] | None
    """Whether each keeps the format of its mode; None for a base model, which has no format to keep."""


def write_answers(path: Path, rows: Iterable[Answered]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")


def read_answers(path: Path) -> list[Answered]:
    """Read what `write_answers` wrote."""
    return [Answered.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
