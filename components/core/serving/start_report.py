"""What a stage reports while vLLM starts, of which nobody knows how long it takes. Imports no torch."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from components.core.runtime.context import Interrupted, StageContext, WaitReport, report_wait

STARTING = "starting vLLM"
"""What progress calls it."""


def report_start(context: StageContext) -> AbstractContextManager[None]:
    """During the block, in which an engine opens, report for how long already."""
    return report_wait(context, STARTING)


def server_start(context: StageContext) -> Callable[[float], None]:
    """For `on_wait` of a server: reports for how long it has been starting, and gives up where the stage is to stop."""
    report = WaitReport(context, STARTING)

    def wait(seconds: float) -> None:
        if context.stopping():
            raise Interrupted
        report(seconds)

    return wait
