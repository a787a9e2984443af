"""Two runs of one recipe at once on one store: one computes, the other waits or computes the same."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from components.core.runtime.runner import events_path
from tests.chaos.attempt import LABEL, NUMBERS, RUN, TIMEOUT_S, Place, attempt, begin
from tests.chaos.history import check_end, check_steps, state
from tests.components.core.base.test_fault_injection import new_place
from tests.waiting import wait_until


def finished(place: Place) -> list[object]:
    """What each attempt that came to its end says of its result."""
    return [entry["outputs"] for entry in place.ledger if entry["what"] == "finished"]


def steps(place: Place) -> list[int]:
    return [entry["step"] for entry in place.ledger if entry["what"] == "step"]


def is_waiting(place: Place) -> bool:
    """Whether an attempt has found that another one computes."""
    return "waiting" in events_path(place.store, RUN, LABEL).read_text()


def test_on_one_machine_one_computes_and_the_other_takes_its_result(store_uri: str, tmp_path: Path) -> None:
    expected = new_place(store_uri, tmp_path / "alone")
    assert attempt(expected) == 0
    place = new_place(store_uri, tmp_path / "both")
    both = [begin(place, held=True) for _ in range(2)]
    wait_until("one computes, and the other waits", lambda: steps(place) and is_waiting(place))
    place.go_on.touch()
    for process in both:
        process.join(TIMEOUT_S)

    assert [process.exitcode for process in both] == [0, 0]
    assert steps(place) == list(range(1, len(NUMBERS) + 1))
    first, second = finished(place)
    assert first == second
    assert state(place) == state(expected)


def test_who_waits_goes_on_where_the_other_was_killed(store_uri: str, tmp_path: Path) -> None:
    expected = new_place(store_uri, tmp_path / "alone")
    assert attempt(expected) == 0
    place = new_place(store_uri, tmp_path / "both")
    first = begin(place, "point.named:2=kill", held=True)
    wait_until("a step", lambda: steps(place))
    second = begin(place)
    wait_until("the other waits", lambda: is_waiting(place))
    place.go_on.touch()
    first.join(TIMEOUT_S)
    second.join(TIMEOUT_S)

    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)
    assert steps(place) == list(range(1, len(NUMBERS) + 1))
    check_end(place, state(expected))


def test_who_waits_can_be_stopped(tmp_path: Path) -> None:
    place = new_place("folder", tmp_path / "both")
    first = begin(place, held=True)
    wait_until("a step", lambda: steps(place))
    second = begin(place)
    wait_until("the other waits", lambda: is_waiting(place))
    assert second.pid is not None
    os.kill(second.pid, signal.SIGTERM)
    second.join(TIMEOUT_S)
    assert second.exitcode == 130
    assert first.is_alive()
    first.kill()
    first.join()


def test_on_two_machines_both_compute_the_same(s3_uri: str, tmp_path: Path) -> None:
    expected = new_place(s3_uri, tmp_path / "alone")
    assert attempt(expected) == 0
    here = new_place(s3_uri, tmp_path / "both")
    there = replace(here, machine="there")
    both = [begin(place, held=True) for place in (here, there)]
    wait_until("both compute", lambda: steps(here).count(1) == 2)
    here.go_on.touch()
    for process in both:
        process.join(TIMEOUT_S)

    assert [process.exitcode for process in both] == [0, 0]
    first, second = finished(here)
    assert first == second
    assert state(here) == state(expected)


@pytest.mark.parametrize("killed", [1, 3])
def test_another_machine_goes_on_where_one_was_killed(s3_uri: str, tmp_path: Path, killed: int) -> None:
    here = new_place(s3_uri, tmp_path / "both")
    assert attempt(here, f"point.mirrored:{killed}=kill") == -signal.SIGKILL
    assert attempt(replace(here, machine="there")) == 0
    assert steps(here) == list(range(1, len(NUMBERS) + 1))
    check_steps(here)
