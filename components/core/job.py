"""What a running stage sees of the platform: a place to report to, and a place to resume from."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components.core.config import Config
from components.core.faults import fault_point
from components.core.point_list import is_whole, list_of, write_list


class Placement(Config):
    """Where and how wide a stage runs; never part of what it computes, so never part of its key."""

    processes: int = 1
    """Training processes (ranks) of the stage."""
    threads: int = 2
    """CPU threads a process."""
    gpus: int = 0
    """GPUs the stage asks for, one a process."""
    node_pool: str | None = None
    """Value of the node label `tessera.dev/pool` that the stage asks for on a cluster."""
    memory_gib: float = 8.0
    """Memory the stage asks for, GiB."""

    @property
    def engine_threads(self) -> int:
        """CPU threads of a vLLM that is timed: one where it computes on them, so that others disturb it less."""
        return 1 if self.gpus == 0 else self.threads


class Reporter(Protocol):
    """Receives what happens in a stage, in order."""

    def emit(self, event: Mapping[str, object]) -> None:
        """Take one event: a plain JSON object with at least `type` and `time`."""


class Events:
    """Appends events to a JSONL file, a line each, so that a reader sees only whole events."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def emit(self, event: Mapping[str, object]) -> None:
        """Append one event, in one write; a line that a killed process left unended is ended first."""
        fault_point("event")
        line = json.dumps(event).encode() + b"\n"
        with self._path.open("ab", buffering=0) as stream:
            stream.write(line if self._ends_whole() else b"\n" + line)

    def _ends_whole(self) -> bool:
        with self._path.open("rb") as stream:
            return stream.seek(0, os.SEEK_END) == 0 or (stream.seek(-1, os.SEEK_END) >= 0 and stream.read() == b"\n")


def read_event(line: str | bytes) -> dict[str, Any] | None:
    """The event of one line of a file of events, None for a line that was cut off."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


class Silent:
    """Drops every event."""

    def emit(self, event: Mapping[str, object]) -> None:
        """Do nothing."""


@dataclass
class Resume:
    """Resume points of one stage key: whole or absent, newest wins, older ones go.

    A point is a folder `<step>` that `save` fills under another name and then renames; the list of its files, with
    their digests, makes it count. `mirror` copies a whole point to a remote store. `notice` is told of points that were
    damaged. `memory` is for what fills points: it keeps its copies there, to use their memory again.
    """

    folder: Path
    interval_s: float = 30.0
    mirror: Callable[[Path], None] | None = None
    notice: Callable[[str], None] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)
    _background: Future[None] | None = None

    def due(self) -> bool:
        """Whether the last point is older than the interval."""
        return time.monotonic() - self._last >= self.interval_s

    def save_in_background(self, step: int, write: Callable[[Path], None]) -> None:
        """Save one point while the caller goes on; `write` must not read what the caller changes. See `wait`."""
        self.wait()
        self._last = time.monotonic()
        pool = ThreadPoolExecutor(1, "resume-point")
        self._background = pool.submit(self.save, step, write)
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the point that is being saved is whole; raises what kept it from being so."""
        if self._background is not None:
            saved, self._background = self._background, None
            saved.result()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write one point: `write` fills a folder, which counts only once it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*"):  # by attempts that were killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        partial = self.folder / f".{step}.partial"
        partial.mkdir()
        fault_point("point.begun")
        write(partial)
        fault_point("point.written")
        final = self.folder / f"{step:09d}"
        list_of(final).unlink(missing_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        fault_point("point.cleared")
        partial.rename(final)
        fault_point("point.placed")
        write_list(final)
        fault_point("point.named")
        if self.mirror is not None:
            self.mirror(final)
        fault_point("point.mirrored")
        for old in self.points():
            if old.name < final.name:
                list_of(old).unlink(missing_ok=True)
                shutil.rmtree(old, ignore_errors=True)
        fault_point("point.trimmed")
        self._last = time.monotonic()

    def points(self) -> list[Path]:
        """Saved points, oldest first."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir()) if self.folder.is_dir() else []

    def latest(self) -> Path | None:
        """The newest point of which every byte is as it was saved, or None."""
        for point in reversed(self.points()):
            if is_whole(point):
                return point
            if self.notice is not None and list_of(point).exists():
                self.notice(f"resume point {point} was changed; it is not used")
        return None


@dataclass
class Job:
    """Handed to every stage's `run`.

    Attributes:
        reporter: takes progress and metrics.
        resume: resume points of this very computation.
        scratch: an empty folder for this run alone, removed afterwards.
        placement: processes, threads and devices at hand.
        rank: this process among `placement.processes`; only rank 0 reports and writes outputs.
        stopping: returns True once the stage was asked to leave (SIGTERM): save a resume point and raise `Interrupted`.
    """

    reporter: Reporter
    resume: Resume
    scratch: Path
    placement: Placement = field(default_factory=Placement)
    rank: int = 0
    stopping: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self.resume.notice = self.note

    def progress(self, done: int, total: int, what: str = "", **metrics: float) -> None:
        """Report that `done` of `total` steps are done, with the numbers that matter at this step."""
        if self.rank == 0:
            event = {"type": "progress", "time": time.time(), "done": done, "total": total, "what": what}
            self.reporter.emit({**event, "metrics": metrics})

    def note(self, text: str) -> None:
        """Report one sentence that a user should read."""
        if self.rank == 0:
            self.reporter.emit({"type": "note", "time": time.time(), "text": text})


class Interrupted(BaseException):
    """The stage was asked to stop, and has saved what it needs to go on."""


def silent_job(folder: Path) -> Job:
    """A job that reports nowhere and keeps its resume points below `folder`: for tests and for calls by hand."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return Job(reporter=Silent(), resume=Resume(folder / "resume"), scratch=scratch, placement=Placement(threads=1))
