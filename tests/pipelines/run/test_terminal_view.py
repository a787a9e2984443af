"""The view says what a reader needs, live or in plain lines."""

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from pipelines.run.progress import StageState
from pipelines.run.terminal_view import LiveView, PlainView, open_view

EVENTS = [
    {"type": "start", "time": 0.0},
    {"type": "progress", "time": 1.0, "done": 1, "total": 4, "what": "training", "metrics": {"loss": 0.25}},
    {"type": "note", "time": 2.0, "text": "a word to the reader"},
    {"type": "finish", "time": 3.0, "seconds": 75.0},
]


WAIT = {"type": "progress", "time": 1.0, "done": 32, "total": 0, "what": "starting a server", "metrics": {}}


def shown(terminal: bool, events: Sequence[dict[str, Any]] = EVENTS) -> str:
    stage = StageState("sft")
    stages = {"sft": stage, "rl": StageState("rl")}
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with open_view(stages, console) as view:
        assert isinstance(view, LiveView if terminal else PlainView)
        for event in events:
            stage.apply(event)
            view.event(stage, event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_each_line_stands_alone() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0].startswith("sft: training 1/4 loss 0.25")
    assert lines[1] == "sft: a word to the reader"
    assert lines[2] == "sft: done 1 min 15 s loss 0.25"


def test_a_wait_is_shown_with_the_time_that_it_took_so_far() -> None:
    events = [EVENTS[0], WAIT]
    assert shown(False, events) == "sft: starting a server, 32 s so far\n"
    assert "starting a server, 32 s so far" in shown(True, events)


def test_on_a_terminal_there_is_a_row_a_stage() -> None:
    last = shown(terminal=True)
    assert "✓ sft" in last
    assert "· rl" in last
    assert "a word to the reader" in last
