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
    _phase_began: tuple[float, int] = (0.0, 0)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        kind = event["type"]
        self.status = STATUS_AFTER.get(kind, self.status)
        if kind == "start":
            self.started = event["time"]
        elif kind == "progress":
            if event["what"] != self.what or event["done"] < self.done or not self._phase_began[0]:
                self._phase_began, self.metrics = (event["time"], event["done"]), {}
            self.done, self.total, self.what = event["done"], event["total"], event["what"]
            self.metrics = event["metrics"] or self.metrics
        elif kind == "note":
            self.notes.append(event["text"])
        elif kind in ("cached", "finish"):
            self.seconds = event["seconds"]
        elif kind == "failed":
            self.failure = dict(event)

    def seconds_left(self, now: float) -> float | None:
        """Time that the present phase still takes at its speed so far; None while that is not known."""
        began, first = self._phase_began
        if self.status != "running" or self.total == 0 or self.done <= first or now <= began:
            return None
        return (self.total - self.done) * (now - began) / (self.done - first)

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
