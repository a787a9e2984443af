"""What a running stage sees of the platform: a place to report to, and a place to resume from."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from components.core.runtime.events import NullReporter, Reporter
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume


@dataclass
class StageContext:
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


def quiet_context(folder: Path) -> StageContext:
    """A job that reports nowhere and keeps its resume points below `folder`: for tests and for calls by hand."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return StageContext(
        reporter=NullReporter(), resume=Resume(folder / "resume"), scratch=scratch, placement=Placement(threads=1)
    )
