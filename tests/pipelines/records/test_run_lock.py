"""Runs whose command was killed: found by whoever looks next, and only those."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from components.core.lineage.replay import ENDED
from components.core.store.store import Store, open_store
from pipelines.recipe.schema import Recipe
from pipelines.records.run_lock import hold_run_lock, mark_dead_runs_killed
from pipelines.records.runs import begin_run, end_run, run_record

RECIPE = Recipe(name="small")
WORKER = """
import sys, time
from components.core.store.store import open_store
from pipelines.records.run_lock import hold_run_lock
with hold_run_lock(open_store(sys.argv[1]), sys.argv[2]):
    print("at work", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_a_run_whose_command_was_killed_becomes_so_once_nobody_works_on_it(store: Store) -> None:
    run = begin_run(store, RECIPE, {})
    with hold_run_lock(store, run):
        with _worker(store, run):
            assert mark_dead_runs_killed(store) == []
        assert mark_dead_runs_killed(store) == []
    assert mark_dead_runs_killed(store) == [run]

    record = run_record(store, run)
    assert record["status"] == "killed"
    assert record["started"] <= record["finished"] + 1
    assert record["finished"] <= time.time()
    assert mark_dead_runs_killed(store) == []


def test_a_run_at_work_stays_running(store: Store) -> None:
    run = begin_run(store, RECIPE, {})
    with _worker(store, run):
        assert mark_dead_runs_killed(store) == []
    assert mark_dead_runs_killed(store) == [run]


def test_runs_that_ended_or_that_another_machine_took_up_are_left_alone(store: Store, tmp_path: Path) -> None:
    run, ended = begin_run(store, RECIPE, {}, "mine"), begin_run(store, RECIPE, {})
    for name in (run, ended):
        with hold_run_lock(store, name):
            pass
    end_run(store, ended, "failed")
    elsewhere = open_store(store.uri, local=tmp_path / "elsewhere")
    begin_run(elsewhere, RECIPE, {}, "mine")

    assert mark_dead_runs_killed(store) == []
    assert run_record(store, ended)["status"] == "failed"


def test_a_killed_run_is_one_that_mlflow_is_told_of() -> None:
    assert "killed" in ENDED


@contextmanager
def _worker(store: Store, run: str) -> Iterator[None]:
    """A process that works on a run, and is killed in the end."""
    command = [sys.executable, "-c", WORKER, store.uri, run]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        yield
        process.kill()
