"""The tasks of objects: when a step is taken."""

import asyncio
from collections import Counter
from typing import Any

import kopf
import pytest

from pipelines.promotion.platform_settings import OperatorSettings
from pipelines.retraining import kopf_operator
from pipelines.retraining.kopf_operator import ObjectTasks, connect
from pipelines.retraining.metrics import OperatorMetrics
from tests.waiting import PATIENCE_S

NOBODY = kopf.Body({})


def tasks_of(resync_s: float) -> ObjectTasks:
    """Tasks that reach no cluster: the tests take their steps."""
    return ObjectTasks(connect(None, None, OperatorSettings(), queues=False), OperatorMetrics(), resync_s)


def test_an_object_takes_steps_as_time_passes_also_after_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Counter[str]()

    def step(_connections: Any, _metrics: Any, _namespace: str, name: str) -> None:
        taken[name] += 1
        if name == "broken":
            raise ZeroDivisionError

    async def watch() -> None:
        tasks = tasks_of(resync_s=0.01)
        for name in ("nano", "broken", "gone"):
            tasks.note_change(NOBODY, "models", name)
        while min(taken["nano"], taken["broken"], taken["gone"]) < 5:
            await asyncio.sleep(0.01)
        tasks.forget("gone")
        before = taken.copy()
        while taken["nano"] < before["nano"] + 5:
            await asyncio.sleep(0.01)
        assert taken["gone"] <= before["gone"] + 1  # the step that was being taken

    monkeypatch.setattr(kopf_operator, "take_step", step)
    asyncio.run(asyncio.wait_for(watch(), PATIENCE_S))


def test_a_change_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    async def watch() -> None:
        tasks = tasks_of(resync_s=3600)
        for number in range(1, 4):
            tasks.note_change(NOBODY, "models", "nano")
            while len(taken) < number:
                await asyncio.sleep(0.01)

    monkeypatch.setattr(kopf_operator, "take_step", lambda *_: taken.append(1))
    asyncio.run(asyncio.wait_for(watch(), PATIENCE_S))
