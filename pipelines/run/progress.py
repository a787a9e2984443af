"""State of each stage of a run, from the events that the stages write."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from components.core.base.errors import InputError, StageFailed, TesseraError
from components.core.runtime.events import EventFile

Status = Literal["waiting", "running", "done", "cached", "failed", "interrupted"]
STATUS_AFTER: Mapping[str, Status] = {
    "start": "running",
    "cached": "cached",
    "finish": "done",
    "failed": "failed",
    "interrupted": "interrupted",
}


@dataclass
class _Phase:
    """Progress under one name: since when, from which step on, and up to which one."""

    what: str
    began: float
    first: int
    done: int = 0


@dataclass
class StageState:
    """The state of one stage, as its events tell it."""

    label: str
    status: Status = "waiting"
    done: int = 0
    total: int = 0
    what: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    started: float = 0.0
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)
    failure: dict[str, Any] = field(default_factory=dict)
    _phase: _Phase | None = None

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        kind = event["type"]
        self.status = STATUS_AFTER.get(kind, self.status)
        if kind == "start":
            self.started = event["time"]
        elif kind == "progress":
            self._progress(event)
        elif kind == "note":
            self.notes.append(event["text"])
        elif kind in ("cached", "finish"):
            self.seconds = event["seconds"]
        elif kind == "failed":
            self.failure = dict(event)

    def _progress(self, event: Mapping[str, Any]) -> None:
        """Take in how far a phase is; one that is waited in goes on after that."""
        self.done, self.total, self.what = event["done"], event["total"], event["what"]
        if self.total == 0:
            self.metrics = {}
            return
        if self._phase is None or self.what != self._phase.what or self.done < self._phase.done:
            self._phase, self.metrics = _Phase(self.what, event["time"], self.done), {}
        self._phase.done = self.done
        self.metrics = event["metrics"] or self.metrics

    def seconds_left(self, now: float) -> float | None:
        """Time that the present phase still takes at its speed so far; None while that is not known."""
        phase = self._phase
        if self.status != "running" or self.total == 0 or phase is None:
            return None
        if self.done <= phase.first or now <= phase.began:
            return None
        return (self.total - self.done) * (now - phase.began) / (self.done - phase.first)

    @property
    def activity(self) -> str:
        """What the stage does, and for how long already where nobody knows how long that takes."""
        return self.what if self.total or not self.done else f"{self.what}, {self.done} s so far"

    def error(self, log: str) -> TesseraError:
        """The error that a failed stage has reported; `log` says where its log is."""
        kind = InputError if self.failure.get("exit_code") == InputError.exit_code else StageFailed
        hint = "\n  ".join(filter(None, [self.failure.get("hint"), f"log: {log}"]))
        return kind(f"stage {self.label}: {self.failure['error']}", hint=hint)


class Follower:
    """Reads the events of a run as they are written, by default from the end of what was there before."""

    def __init__(self, files: Mapping[str, Path], *, from_start: bool = False) -> None:
        self.stages = {label: StageState(label) for label in files}
        self._files = {
            label: EventFile(path, path.stat().st_size if path.exists() and not from_start else 0)
            for label, path in files.items()
        }

    def poll(self) -> Iterator[tuple[StageState, dict[str, Any]]]:
        """Take in whatever is new; yields each event with the state after it."""
        for label, file in self._files.items():
            for event in file.read():
                self.stages[label].apply(event)
                yield self.stages[label], event
