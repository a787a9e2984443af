"""Test problems, the answers of all models to them, and the checkpoint from which an evaluation resumes."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from components.core.base.config import Config
from components.core.runtime.resume import Resume
from components.core.text.problems import Problem, read_problems

SPLITS = ("standard", "hard")


def load_problems(folder: Path, limit: int) -> list[Problem]:
    """Read the first `limit` problems of each split that exists.

    Raises:
        DataError: a row lacks a field.
    """
    return [problem for split in SPLITS for problem in read_problems(folder / f"test-{split}.jsonl", split, limit)]


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
    with path.open(encoding="utf-8") as stream:  # `splitlines` would also split at U+2028 inside an answer
        return [AnswerRow.model_validate_json(line) for line in stream]


@dataclass
class TaskResults:
    """What lm-eval found for one model.

    Attributes:
        results: by task and prompt mode, `metrics`, `standard_errors`, number of `problems`, and `version` of the task.
        samples: each problem with its prompt, responses and grades, as lm-eval records them.
    """

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class EvalCheckpoint:
    """Speeds, once all are measured, held-out losses, and what models have answered: all problems, or all tasks."""

    speeds: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tokens per second and their interval by role, as in `metrics.json`."""
    losses: dict[str, float] = field(default_factory=dict)
    """Mean loss on held-out text by role, nats a token."""
    answers: dict[str, list[AnswerRow]] = field(default_factory=dict)
    """Answers by role."""
    tasks: dict[str, TaskResults] = field(default_factory=dict)
    """Results of tasks by role."""

    @classmethod
    def latest(cls, resume: Resume) -> Self:
        """Read the newest resume point; empty if there is none."""
        checkpoint, point = cls(), resume.latest()
        if point is not None:
            measured = json.loads((point / "measured.json").read_text(encoding="utf-8"))
            checkpoint.speeds, checkpoint.losses = measured["speeds"], measured["losses"]
            for row in read_answers(point / "answers.jsonl"):
                checkpoint.answers.setdefault(row.model, []).append(row)
            tasks = json.loads((point / "tasks.json").read_text(encoding="utf-8"))
            checkpoint.tasks = {role: TaskResults(**found) for role, found in tasks.items()}
        return checkpoint

    def save(self, resume: Resume) -> None:
        """Write a resume point."""
        resume.save(len(self.losses) + len(self.answers) + len(self.tasks), self._write)

    def _write(self, point: Path) -> None:
        measured = {"speeds": self.speeds, "losses": self.losses}
        (point / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
        write_answers(point / "answers.jsonl", (row for rows in self.answers.values() for row in rows))
        tasks = {role: asdict(found) for role, found in self.tasks.items()}
        (point / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
