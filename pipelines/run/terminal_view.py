"""The terminal's view of a run: a line a stage, or plain lines where there is no terminal."""

import time
from collections.abc import Mapping
from typing import Any, Protocol, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.report.summary import format_duration
from pipelines.run.progress import StageState

PLAIN_INTERVAL_S = 15.0
MARKS = {"waiting": "·", "running": "▸", "done": "✓", "cached": "=", "failed": "✗", "interrupted": "‖"}
STYLES = {
    "waiting": "dim",
    "running": "bold",
    "done": "green",
    "cached": "cyan",
    "failed": "red",
    "interrupted": "yellow",
}


class View(Protocol):
    """Shows the stages of a run."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(self, *exception: object) -> None:
        """Leave the last state on the screen."""

    def event(self, stage: StageState, event: Mapping[str, Any]) -> None:
        """Show one event, with the state of its stage after it."""


def open_view(stages: Mapping[str, StageState], console: Console) -> View:
    """A live table on a terminal, plain lines elsewhere."""
    return LiveView(stages, console) if console.is_terminal else PlainView(console)


class LiveView:
    """A table that is drawn again as the stages go on."""

    def __init__(self, stages: Mapping[str, StageState], console: Console) -> None:
        self._stages = stages
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def event(self, stage: StageState, event: Mapping[str, Any]) -> None:
        """The table shows the state itself; notes stay above it."""
        if event["type"] == "note":
            self._live.console.print(Text(f"{stage.label}: {event['text']}", style="dim"))

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        now = time.time()
        for stage in self._stages.values():
            table.add_row(*_row(stage, now))
        return table


class PlainView:
    """A line when something begins or ends, and one now and then between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def event(self, stage: StageState, event: Mapping[str, Any]) -> None:
        """Print what a reader of a log wants to see."""
        now = time.monotonic()
        if event["type"] == "start":
            return  # the first progress follows, or the word that it was cached
        if event["type"] == "progress":
            if now - self._last.get(stage.label, 0.0) < PLAIN_INTERVAL_S:
                return
            self._last[stage.label] = now
            steps = f"{stage.done}/{stage.total}" if stage.total else ""
            text = f"{stage.activity} {steps} {_numbers(stage)} {_left(stage, time.time())}"
        elif event["type"] == "note":
            text = event["text"]
        elif event["type"] == "failed":
            text = "failed"
        else:
            text = f"{stage.status} {_spent(stage)} {_numbers(stage)}"
        self._console.print(f"{stage.label}: {' '.join(text.split())}", markup=False, highlight=False, soft_wrap=True)


def _row(stage: StageState, now: float) -> list[RenderableType]:
    """The cells of one stage."""
    mark = Text(f"{MARKS[stage.status]} {stage.label}", style=STYLES[stage.status])
    if stage.status == "running":
        bar: RenderableType = ProgressBar(total=stage.total or None, completed=stage.done, width=20)
        spent = format_duration(now - stage.started)
        return [mark, bar, Text(spent), Text(_left(stage, now)), Text(f"{stage.activity} {_numbers(stage)}".strip())]
    word = "" if stage.status == "waiting" else stage.status
    return [
        mark,
        Text(word, style=STYLES[stage.status]),
        Text(_spent(stage)),
        Text(""),
        Text(_numbers(stage)),
    ]


def _spent(stage: StageState) -> str:
    """Time that a finished stage took."""
    return "" if stage.seconds is None else format_duration(stage.seconds)


def _left(stage: StageState, now: float) -> str:
    """Time left, in words."""
    left = stage.seconds_left(now)
    return "" if left is None else f"{format_duration(left)} left"


def _numbers(stage: StageState) -> str:
    """The metrics last reported."""
    return "  ".join(f"{name} {value:.4g}" for name, value in stage.metrics.items())
