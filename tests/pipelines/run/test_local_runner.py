"""A run on this machine: recorded, cached, stopped as a whole, and honest about what failed."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from components.core.base import fault_injection as faults
from components.core.base.config import digest_of
from components.core.base.errors import InputError
from components.core.runtime.hardware import VISIBLE_GPUS
from components.core.runtime.placement import Placement
from components.core.store.store import open_store
from pipelines.recipe import registry
from pipelines.recipe.graph import Graph, Source, Task
from pipelines.recipe.registry import find_stage
from pipelines.recipe.schema import Recipe, load_recipe
from pipelines.records.runs import artifacts, begin_stage, run_record, run_records, stage_documents
from pipelines.run.local_runner import log_path, run_graph, run_recipe, task_environment
from pipelines.run.single_stage import run_single
from tests.chaos.processes import living_with
from tests.components.core.fake_stage import STAGE, FakeConfig, numbers_folder
from tests.pipelines.run.gpu_stage import AT_ONCE, MEETING_FOLDER
from tests.pipelines.run.gpu_stage import STAGE as GPU_STAGE
from tests.waiting import PATIENCE_S, wait_until

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
    assert log_path(store, first, "data").exists()

    second, shown = run(recipe, tmp_path / "store")
    assert "data: cached" in shown
    assert (first, second) == ("only-data-1", "only-data-2")
    assert stage_documents(store, second)["data"]["cached"] is True
    assert artifacts(store, first) == artifacts(store, second)
    assert not log_path(store, second, "data").exists()  # no process was started


def test_a_run_may_go_on_in_another_place(only_data: Path, tmp_path: Path) -> None:
    where = ["placement={threads: 1}", "data.placement={memory_gib: 2, priority: high}"]
    first, _ = run(load_recipe(only_data, [TINY]), tmp_path / "store", "one")
    again, shown = run(load_recipe(only_data, [TINY, *where]), tmp_path / "store", "one")
    assert first == again
    assert "data: cached" in shown
    record = run_record(open_store(str(tmp_path / "store")), again)
    assert record["recipe"]["placement"]["threads"] == 1
    with pytest.raises(InputError, match="there is a run 'one' of another recipe"):
        run(load_recipe(only_data, [TINY, "seed=1"]), tmp_path / "store", "one")


def test_a_run_takes_what_a_stage_alone_has_made(only_data: Path, tmp_path: Path) -> None:
    store, text = open_store(tmp_path / "store"), tmp_path / "text.txt"
    text.write_text("a text\n\nand another\n" * 20)
    settings = {"arithmetic": {"num_train": 60, "num_chats": 20, "num_validation": 10, "num_test": 10}}
    console = Console(file=io.StringIO())
    record = run_single(find_stage("data"), settings, {"own_corpus": [str(text)]}, {}, store, console)
    done, shown = run(load_recipe(only_data, [TINY, f"corpus={text}"]), tmp_path / "store")
    assert "data: cached" in shown
    assert stage_documents(store, done)["data"]["key"] == record.key


def test_a_stage_that_refuses_its_data_is_named_with_its_hint_and_log(only_data: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nno json\n')
    recipe = load_recipe(only_data, [f"corpus={tmp_path / 'bad.jsonl'}"])
    with pytest.raises(InputError, match="stage data: ") as caught:
        run(recipe, tmp_path / "store")
    assert caught.value.hint is not None
    assert "data.log" in caught.value.hint
    store = open_store(str(tmp_path / "store"))
    assert run_records(store)[-1]["status"] == "failed"


def test_nothing_is_written_where_the_recipe_is_wrong(only_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        run(load_recipe(only_data, ["corpus=/absent.txt"]), tmp_path / "store")
    assert not (tmp_path / "store" / "runs").exists()


def test_shards_that_share_cores_wait_without_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    def policy(*shards: str) -> str | None:
        item = Task("fake", STAGE, FakeConfig(), Placement(), {}, shards)
        return task_environment(item).get("OMP_WAIT_POLICY")

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert [policy("1/2"), policy("0/1"), policy()] == ["PASSIVE", None, None]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert policy("1/2") == "ACTIVE"


def run_command_of(recipe: Path, store: Path, setting: str) -> list[str]:
    """What a user types."""
    return [sys.executable, "-m", "pipelines", "run", str(recipe), "--store", str(store), "--set", setting]


@pytest.fixture
def slow_run(only_data: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in the middle of its stage; its processes are known by a marker."""
    slow = "data.arithmetic={num_train: 3000000, num_chats: 20, num_validation: 10, num_test: 10}"
    command = run_command_of(only_data, tmp_path / "store", slow)
    environment = {**os.environ, "MARKER": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events = tmp_path / "store" / "local" / "runs" / "only-data-1" / "data.jsonl"
    wait_until("events", events.exists)
    yield process
    process.kill()
    process.communicate()
    wait_until("no process is left", lambda: not living_with("MARKER", str(tmp_path)))


def test_sigterm_ends_every_process_and_says_how_to_go_on(slow_run: subprocess.Popen[str], tmp_path: Path) -> None:
    slow_run.send_signal(signal.SIGTERM)
    _, error = slow_run.communicate(timeout=PATIENCE_S)
    assert slow_run.returncode == 130
    assert "the same command goes on from here" in error
    record = json.loads((tmp_path / "store" / "runs" / "only-data-1" / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert living_with("MARKER", str(tmp_path)) == []


def test_nothing_outlives_a_command_that_is_killed(slow_run: subprocess.Popen[str], tmp_path: Path) -> None:
    assert len(living_with("MARKER", str(tmp_path))) >= 2
    slow_run.kill()
    wait_until("no process is left", lambda: not living_with("MARKER", str(tmp_path)))
    assert list((tmp_path / "store" / "local" / "tmp").glob("*/*")) == []


def test_a_stage_that_is_killed_is_named(slow_run: subprocess.Popen[str], tmp_path: Path) -> None:
    (stage,) = psutil.Process(slow_run.pid).children()
    stage.kill()
    _, error = slow_run.communicate(timeout=PATIENCE_S)
    assert slow_run.returncode == 1
    assert "stage data was killed by SIGKILL" in error
    assert living_with("MARKER", str(tmp_path)) == []


@pytest.mark.parametrize("point", ["run.begun", "run.ending"])
def test_a_command_that_is_killed_at_either_end_is_given_again(only_data: Path, tmp_path: Path, point: str) -> None:
    store = tmp_path / "store"
    command = [*run_command_of(only_data, store, TINY), "--run", "one"]
    killed = subprocess.run(command, env={**os.environ, faults.VARIABLE: f"{point}=kill"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    done, _ = run(load_recipe(only_data, [TINY]), store, "one")
    assert run_record(open_store(store), done)["status"] == "succeeded"
    assert stage_documents(open_store(store), done)["data"]["cached"] is (point == "run.ending")


@pytest.mark.parametrize(
    ("visible", "gpus", "num_items", "at_once", "expected"),
    [
        ("4,5,GPU-6", 1, 3, 3, ["4", "5", "GPU-6"]),  # more than would run at once on a CPU
        ("4,5,6,7", 2, 2, 2, ["4,5", "6,7"]),
        ("7", 1, 2, 1, ["7", "7"]),  # one after the other
        ("4,5", 3, 2, 1, ["4,5", "4,5"]),  # fewer than asked for: the stage itself says what is missing
    ],
)
def test_each_item_of_a_fan_out_has_gpus_of_its_own(
    visible: str,
    gpus: int,
    num_items: int,
    at_once: int,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry.STAGES, "gpu", "tests.pipelines.run.gpu_stage:STAGE")  # type: ignore[arg-type]
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    for name, value in {VISIBLE_GPUS: visible, MEETING_FOLDER: str(meeting), AT_ONCE: str(at_once)}.items():
        monkeypatch.setenv(name, value)
    store = open_store(tmp_path / "store")
    sources = {"numbers": store.put_folder(numbers_folder(tmp_path / "numbers", 1), "data").digest}
    shards = tuple(f"{index}/{num_items}" for index in range(num_items))
    graph = Graph("fan-out", digest_of("fan-out"))
    place = Placement(threads=1, gpus=gpus)
    graph.tasks.append(Task("loop", GPU_STAGE, FakeConfig(), place, {"numbers": Source("numbers")}, shards))

    name = begin_stage(store, graph, {}, sources)
    run_graph(store, name, graph, sources, Console(file=io.StringIO()))
    records = [store.stage_record(document["key"]) for document in stage_documents(store, name).values()]
    assert sorted(str(record.result["gpus"]) for record in records if record is not None) == expected
