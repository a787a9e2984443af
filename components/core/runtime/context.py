"""The platform as a running stage sees it: where to report to, and where to resume from."""

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
        resume: checkpoints of this computation.
        scratch: an empty folder for this run alone, removed afterwards.
        placement: processes, threads and devices of the stage.
        rank: this process among `placement.num_ranks`; only rank 0 reports and writes outputs.
        stopping: returns True once the stage was asked to stop (SIGTERM): save a checkpoint, raise `Interrupted`.
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
        """Report that `done` of `total` steps are done, with the numbers that matter at this step.

        A metric that is to be seen in Prometheus is declared in `metric_names`.
        """
        if self.rank == 0:
            event = {"type": "progress", "time": time.time(), "done": done, "total": total, "what": what}
            saved = {} if self.resume.saved_at is None else {"checkpoint": self.resume.saved_at}
            self.reporter.emit({**event, **saved, "metrics": metrics})

    def note(self, text: str) -> None:
        """Report one sentence that a user should read."""
        if self.rank == 0:
            self.reporter.emit({"type": "note", "time": time.time(), "text": text})


class Interrupted(BaseException):
    """The stage was asked to stop, and has saved a checkpoint to go on from."""


def quiet_context(folder: Path) -> StageContext:
    """A context that reports nowhere and saves its checkpoints below `folder`: for tests and interactive use."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return StageContext(
        reporter=NullReporter(), resume=Resume(folder / "resume"), scratch=scratch, placement=Placement(threads=1)
    )
