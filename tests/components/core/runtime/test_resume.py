"""How often checkpoints are saved: by what they cost, or as the user says."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from components.core.runtime import resume as module
from components.core.runtime.resume import COST_FRACTION, MIN_INTERVAL_S, Resume
from tests.waiting import PATIENCE_S


class Clock:
    """A clock that stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = self.worked = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.worked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def saved_at_once(resume: Resume, clock: Clock, step: int, cost_s: float) -> None:
    """A checkpoint for which the stage stands still, as one of the block library."""

    def write(folder: Path) -> None:
        clock.now += cost_s

    resume.save(step, write)


def saved_in_the_background(resume: Resume, clock: Clock, step: int, cost_s: float) -> None:
    """A checkpoint half of whose cost is to copy what is saved; the other half is to write the copy."""

    def copy() -> Callable[[Path], None]:
        clock.now += cost_s / 2
        return write

    def write(folder: Path) -> None:
        clock.worked += cost_s / 2

    resume.save_in_background(step, copy)
    resume.wait()


@pytest.mark.parametrize("save", [saved_at_once, saved_in_the_background])
def test_checkpoints_take_at_most_one_percent_of_the_time(
    tmp_path: Path, clock: Clock, save: Callable[[Resume, Clock, int, float], None]
) -> None:
    resume, spent, intervals, last = Resume(tmp_path), 0.0, list[float](), 0.0
    for step in range(1, 4000):
        clock.now += 1.0
        if resume.due():
            intervals.append(clock.now - last)
            assert spent <= COST_FRACTION * clock.now
            cost = 1 / 128 if len(intervals) == 1 else len(intervals) / 2  # the model grows, or the disk gets slower
            save(resume, clock, step, cost)
            spent, last = spent + cost, clock.now
    assert intervals[:4] == [MIN_INTERVAL_S, MIN_INTERVAL_S, 100, 150]
    assert len(intervals) > 8


def test_an_interval_of_the_user_is_kept_whatever_it_costs(tmp_path: Path, clock: Clock) -> None:
    resume = Resume(tmp_path, interval_s=5.0)
    assert not resume.due()
    for step in range(3):
        clock.now += 5.0
        assert resume.due()
        saved_at_once(resume, clock, step, 60.0)
        assert not resume.due()


def test_none_is_due_while_one_is_being_written(tmp_path: Path, clock: Clock) -> None:
    resume, go_on = Resume(tmp_path), threading.Event()

    def write(folder: Path) -> None:
        assert go_on.wait(PATIENCE_S)

    resume.save_in_background(1, lambda: write)
    clock.now += 10 * MIN_INTERVAL_S
    assert not resume.due()
    go_on.set()
    resume.wait()
    assert not resume.due()
    clock.now += MIN_INTERVAL_S
    assert resume.due()
