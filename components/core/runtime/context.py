"""The platform as a running stage sees it: where to report to, and where to resume from."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from components.core.base.background import repeated
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

        Where the total is 0, `done` is the time that was waited so far, seconds; see `WaitReport`.

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


WAIT_REPORT_S = 5.0
"""Time between two reports of a wait, seconds."""


class WaitReport:
    """Reports how long something takes that does not tell how far it is, such as the start of a server.

    Such progress is of whole seconds, and of a total of 0.
    """

    def __init__(self, context: StageContext, what: str) -> None:
        self._context, self._what, self._next_s = context, what, 0.0

    def __call__(self, seconds: float) -> None:
        """Take the time so far; it is reported now and then."""
        if seconds >= self._next_s:
            self._next_s = seconds + WAIT_REPORT_S
            self._context.progress(int(seconds), 0, self._what)


@contextmanager
def report_wait(context: StageContext, what: str) -> Iterator[None]:
    """During the block, which reports nothing itself, report how long it takes."""
    report, began = WaitReport(context, what), time.monotonic()
    report(0.0)
    with repeated(lambda: report(time.monotonic() - began), WAIT_REPORT_S):
        yield


class Interrupted(BaseException):
    """The stage was asked to stop, and has saved a checkpoint to go on from."""


def quiet_context(folder: Path) -> StageContext:
    """A context that reports nowhere and saves its checkpoints below `folder`: for tests and interactive use."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return StageContext(
        reporter=NullReporter(), resume=Resume(folder / "resume"), scratch=scratch, placement=Placement(threads=1)
    )
