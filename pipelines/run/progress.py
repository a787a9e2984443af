"""What is known of each stage of a run, from the events that the stages write."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from components.core.runtime.events import read_event

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
                self._phase_began = (event["time"], event["done"])
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
        if self.status != "running" or self.done <= first or now <= began:
            return None
        return (self.total - self.done) * (now - began) / (self.done - first)


class Follower:
    """Reads the events of a run as they are written, from the end of what was there before."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.stages = {label: StageState(label) for label in files}
        self._files = dict(files)
        self._offsets = {label: path.stat().st_size if path.exists() else 0 for label, path in files.items()}

    def poll(self) -> Iterator[tuple[StageState, dict[str, Any]]]:
        """Take in whatever is new; yields each event with the state after it."""
        for label, path in self._files.items():
            for event in self._new_events(label, path):
                self.stages[label].apply(event)
                yield self.stages[label], event

    def _new_events(self, label: str, path: Path) -> Iterator[dict[str, Any]]:
        """Whole new lines of one file."""
        if not path.exists() or path.stat().st_size <= self._offsets[label]:
            return
        with path.open("rb") as stream:
            stream.seek(self._offsets[label])
            for line in _whole_lines(stream):
                self._offsets[label] += len(line)
                if (event := read_event(line)) is not None:
                    yield event


def _whole_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that end; the last one may still be being written."""
    return (line for line in lines if line.endswith(b"\n"))
