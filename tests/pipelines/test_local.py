"""A run on this machine: recorded, cached, stopped as a whole, and honest about what failed."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from components.core.errors import InputError
from components.core.store import open_store
from pipelines.local import log_path, run_recipe
from pipelines.recipe import Recipe, load_recipe
from pipelines.runs import artifacts, run_record, run_records, stage_documents

TINY = "data.arithmetic={num_train: 60, num_chats: 20, num_validation: 10, num_test: 10}"


def run(recipe: Recipe, store: Path, name: str | None = None) -> tuple[str, str]:
    """Run a recipe; returns the run's name and what was shown."""
    screen = Console(file=io.StringIO(), width=200)
    done = run_recipe(recipe, store_uri=str(store), name=name, console=screen)
    assert isinstance(screen.file, io.StringIO)
    return done, screen.file.getvalue()


def test_a_run_is_recorded_and_a_second_one_is_cached(only_data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(only_data, [TINY])
    first, shown = run(recipe, tmp_path / "store")
    assert "data: done" in shown
    store = open_store(str(tmp_path / "store"))
    assert run_record(store, first)["status"] == "succeeded"
    assert stage_documents(store, first)["data"]["cached"] is False
    assert "Running pipeline" in log_path(store, first).read_text()

    second, shown = run(recipe, tmp_path / "store")
    assert "data: cached" in shown
    assert (first, second) == ("only-data-1", "only-data-2")
    assert stage_documents(store, second)["data"]["cached"] is True
    assert artifacts(store, first) == artifacts(store, second)
    assert not log_path(store, second).exists()  # nothing was left for KFP to do


def test_a_stage_that_refuses_its_data_is_named_with_its_hint_and_log(only_data: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nno json\n')
    recipe = load_recipe(only_data, [f"corpus={tmp_path / 'bad.jsonl'}"])
    with pytest.raises(InputError, match="stage data: ") as caught:
        run(recipe, tmp_path / "store")
    assert caught.value.hint is not None
    assert "run.log" in caught.value.hint
    store = open_store(str(tmp_path / "store"))
    assert run_records(store)[-1]["status"] == "failed"


def test_nothing_is_written_where_the_recipe_is_wrong(only_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        run(load_recipe(only_data, ["corpus=/absent.txt"]), tmp_path / "store")
    assert not (tmp_path / "store" / "runs").exists()


def test_sigterm_ends_every_process_and_says_how_to_go_on(only_data: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    slow = "data.arithmetic={num_train: 300000, num_chats: 20, num_validation: 10, num_test: 10}"
    code = "import sys; from pipelines.cli import run_command; sys.exit(run_command(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run", str(only_data), "--store", str(store), "--set", slow]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events = store / "local" / "runs" / "only-data-1" / "data.jsonl"
    deadline = time.monotonic() + 60
    while not events.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    group = _executor_of(process.pid)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in error
    assert json.loads((store / "runs" / "only-data-1" / "run.json").read_text())["status"] == "interrupted"
    assert _living(group) == []


def _living(group: int) -> list[str]:
    """Processes of a group that have not ended; those that nobody has waited for yet have."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                found.append(path.parent.name)
    return found


def _executor_of(parent: int) -> int:
    """Process group of the child that runs the pipeline."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(children[0])
