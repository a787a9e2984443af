"""Test problems, and the checkpoint from which an evaluation resumes."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from components.core.runtime.resume import Resume
from components.core.text.problems import Problem, read_problems
from components.eval.answer_rows import SPLITS, AnswerRow, read_answers, write_answers


def load_problems(folder: Path, limit: int) -> list[Problem]:
    """Read the first `limit` problems of each split that exists.

    Raises:
        DataError: a row lacks a field.
    """
    return [problem for split in SPLITS for problem in read_problems(folder / f"test-{split}.jsonl", split, limit)]


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
