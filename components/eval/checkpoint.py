"""The finished part of an evaluation, from which an interrupted one resumes."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from components.core.runtime.resume import Resume
from components.eval.answers import AnswerRow, read_answers, write_answers


@dataclass
class EvalCheckpoint:
    """Speeds, once all are measured, and the answers of models that have answered every problem."""

    speeds: dict[str, float] = field(default_factory=dict)
    """Tokens per second by role."""
    answers: dict[str, list[AnswerRow]] = field(default_factory=dict)
    """Answers by role."""

    @classmethod
    def latest(cls, resume: Resume) -> Self:
        """Read the newest resume point; empty if there is none."""
        checkpoint, point = cls(), resume.latest()
        if point is not None:
            checkpoint.speeds = json.loads((point / "speeds.json").read_text(encoding="utf-8"))
            for row in read_answers(point / "answers.jsonl"):
                checkpoint.answers.setdefault(row.model, []).append(row)
        return checkpoint

    def save(self, resume: Resume) -> None:
        """Write a resume point."""
        resume.save(len(self.answers), self._write)

    def _write(self, point: Path) -> None:
        (point / "speeds.json").write_text(json.dumps(self.speeds), encoding="utf-8")
        write_answers(point / "answers.jsonl", (row for rows in self.answers.values() for row in rows))
