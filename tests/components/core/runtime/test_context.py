"""A wait of unknown length is reported as the time that has passed."""

import time
from typing import Any

import pytest

from components.core.runtime import context as context_module
from components.core.runtime.context import StageContext, WaitReport, report_wait
from tests.components.conftest import Recorder
from tests.waiting import wait_until


def waits(recorder: Recorder) -> list[tuple[Any, ...]]:
    return [(event["what"], event["done"], event["total"]) for event in recorder.events]


def test_a_wait_is_reported_at_once_and_then_every_few_seconds(
    recorded_context: StageContext, recorder: Recorder
) -> None:
    report = WaitReport(recorded_context, "starting a server")
    for seconds in (0.0, 0.1, 4.9, 5.2, 9.0, 10.1, 10.3):
        report(seconds)
    assert waits(recorder) == [("starting a server", done, 0) for done in (0, 5, 10)]


def test_work_that_reports_nothing_is_reported_meanwhile_and_no_longer(
    recorded_context: StageContext, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_module, "WAIT_REPORT_S", 0.01)
    began = time.monotonic()
    with report_wait(recorded_context, "starting vLLM"):
        wait_until("three reports", lambda: len(recorder.events) >= 3)
    count = len(recorder.events)
    assert {(what, total) for what, _, total in waits(recorder)} == {("starting vLLM", 0)}
    assert 0 <= waits(recorder)[-1][1] <= time.monotonic() - began
    with pytest.raises(RuntimeError, match="no memory"), report_wait(recorded_context, "starting vLLM"):
        raise RuntimeError("no memory")
    assert len(recorder.events) > count
