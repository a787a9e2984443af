"""Keys, cache, failures, interruption and resumption, shown on a stage that adds numbers up."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import DataError, InputError, StageFailed, StoreError
from components.core.runtime import runner
from components.core.runtime.context import Interrupted
from components.core.runtime.events import NullReporter
from components.core.runtime.hardware import timing_device
from components.core.runtime.placement import Placement
from components.core.runtime.runner import (
    Digests,
    events_path,
    load_verified_record,
    lookup_cached_stage,
    run_stage,
    stage_key,
)
from components.core.store.store import Store, open_store
from tests.components.core.fake_stage import STAGE, FakeConfig, numbers_folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def numbers(store: Store, tmp_path: Path) -> str:
    return store.put_folder(numbers_folder(tmp_path / "numbers", 1, 2, 3, 4), "data").digest


class Events:
    """Keeps events, and asks this process to stop once a number of steps were reported."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.seen: list[Mapping[str, Any]] = []

    def emit(self, event: Mapping[str, object]) -> None:
        self.seen.append(event)
        if event["type"] == "progress" and event["done"] == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.seen]

    @property
    def steps(self) -> list[int]:
        return [event["done"] for event in self.seen if event["type"] == "progress"]


def run(store: Store, inputs: Digests, config: FakeConfig | None = None, **options: Any) -> tuple[Any, Events]:
    events = options.pop("reporter", None) or Events()
    return run_stage(STAGE, config or FakeConfig(), inputs, store=store, reporter=events, **options), events


def total(store: Store, digest: str) -> int:
    value: int = json.loads((store.fetch(digest) / "total.json").read_text())
    return value


def test_the_record_says_what_was_made_of_what(store, numbers):
    record, events = run(store, {"numbers": numbers}, FakeConfig(factor=3))

    assert total(store, record.outputs["total"]) == 30
    assert set(record.outputs) == {"total"}  # an output that stays empty is none
    assert (record.inputs, record.result) == ({"numbers": numbers}, {"total": 30})
    assert record.config == FakeConfig(factor=3).canonical()
    assert record.key == stage_key(STAGE, FakeConfig(factor=3), {"numbers": numbers})
    assert store.stage_record(record.key) == record
    assert events.types == ["start", *["progress"] * 4, "finish"]
    assert list((store.local / "tmp").iterdir()) == []
    assert store.documents(f"resume/{record.key}/") == []


def test_memory_is_measured_where_the_stage_computes(store, numbers):
    record, _ = run(store, {"numbers": numbers})
    on_gpu, _ = run(store, {"numbers": numbers}, FakeConfig(factor=2), placement=Placement(gpus=1))

    assert record.peak_memory_bytes > 1 << 20
    assert on_gpu.peak_memory_bytes is None  # it used no GPU


@pytest.mark.parametrize(("place", "as_ranks"), [({}, False), ({"offload": True}, True)])
def test_a_stage_that_offloads_is_a_rank_as_one_of_several(store, numbers, monkeypatch, place, as_ranks):
    ranks = []

    def run_ranks(stage, home, config, **rest):
        ranks.append(home)
        return runner.load_entry(stage.entry)(config, **rest)

    monkeypatch.setattr(runner, "run_ranks", run_ranks)
    record, _ = run(store, {"numbers": numbers}, placement=Placement(gpus=1, **place))
    assert ranks == [(store, record.key)] * as_ranks


def test_an_input_that_takes_many_gets_them_in_order(store, numbers, tmp_path):
    other = store.put_folder(numbers_folder(tmp_path / "other", 100), "data").digest
    record, events = run(store, {"numbers": numbers, "more": [other, numbers]})

    assert record.result == {"total": 120}
    assert [e["metrics"]["sum"] for e in events.seen if e["type"] == "progress"][4] == 110


def test_the_key_changes_with_config_inputs_and_code(store, numbers, monkeypatch):
    plain = stage_key(STAGE, FakeConfig(), {"numbers": numbers})

    assert stage_key(STAGE, FakeConfig(), {"numbers": numbers, "more": []}) == plain
    keys = [
        stage_key(STAGE, FakeConfig(factor=2), {"numbers": numbers}),
        stage_key(STAGE, FakeConfig(), {"numbers": "0" * 64}),
        stage_key(STAGE, FakeConfig(), {"numbers": numbers, "more": [numbers]}),
        stage_key(STAGE, FakeConfig(), {"numbers": numbers, "more": [numbers, "0" * 64]}),
        stage_key(STAGE, FakeConfig(), {"numbers": numbers, "more": ["0" * 64, numbers]}),
    ]
    for code in (("f" * 64, {}), ("0" * 64, {"torch": "9"})):
        monkeypatch.setattr("components.core.runtime.runner.code_digest", lambda entry, code=code: code)
        keys.append(stage_key(STAGE, FakeConfig(), {"numbers": numbers}))
    assert len({plain, *keys}) == 1 + len(keys)


def test_the_key_of_measured_times_has_the_device_and_that_of_others_has_not(store, numbers, monkeypatch):
    timed = replace(STAGE, measures_time=lambda config, inputs: config.factor > 1 and "numbers" in inputs)
    configs = {"measures": FakeConfig(factor=2), "does not": FakeConfig()}

    def keys() -> dict[str, str]:
        return {name: stage_key(timed, config, {"numbers": numbers}) for name, config in configs.items()}

    here = keys()
    assert keys() == here
    assert here["does not"] == stage_key(STAGE, configs["does not"], {"numbers": numbers})
    record = run_stage(timed, configs["measures"], {"numbers": numbers}, store=store, reporter=NullReporter())
    assert record.key == here["measures"]
    assert record.device == timing_device()
    assert store.checked_record(record.key) == record
    monkeypatch.setattr("components.core.runtime.runner.timing_device", lambda: "NVIDIA H100 80GB HBM3, 8 GPUs")
    assert keys()["measures"] != here["measures"]
    assert keys()["does not"] == here["does not"]


def test_placement_changes_nothing_that_is_computed(store, numbers):
    first, _ = run(store, {"numbers": numbers}, placement=Placement(threads=1))
    second, events = run(store, {"numbers": numbers}, placement=Placement(threads=2, memory_gib=64, node_pool="gpu"))

    assert second == first
    assert events.types == ["start", "cached"]


def test_two_processes_make_what_one_makes(store, numbers, tmp_path):
    alone, _ = run(store, {"numbers": numbers})
    other_store = open_store(tmp_path / "other")
    other_store.put_folder(store.fetch(numbers), "data")
    both, events = run(other_store, {"numbers": numbers}, placement=Placement(processes=2, threads=1))

    assert (both.key, both.outputs, both.result) == (alone.key, alone.outputs, alone.result)
    assert events.steps == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["changed", "shortened", "removed"])
def test_a_damaged_result_is_computed_anew_and_mended(store, numbers, damage):
    record, _ = run(store, {"numbers": numbers}, FakeConfig(factor=10))
    (entry,) = store.manifest(record.outputs["total"]).files.values()
    (blob,) = (Path(store.uri) / "blobs").rglob(entry.sha256)
    blob.chmod(0o600)
    if damage == "removed":
        blob.unlink()
    else:
        blob.write_text("999" if damage == "changed" else "")
    again = open_store(store.uri)  # another process: nothing is known to be whole

    assert load_verified_record(again, record.key) is None
    mended, events = run(again, {"numbers": numbers}, FakeConfig(factor=10))
    assert "cached" not in events.types
    assert mended.outputs == record.outputs
    assert total(again, mended.outputs["total"]) == 100
    assert load_verified_record(open_store(store.uri), record.key) is not None


@pytest.mark.parametrize(
    ("fail", "raised", "message", "hint", "exit_code"),
    [
        ("data", DataError, "row 3 is no number", "mend row 3", 2),
        ("bug", StageFailed, "fake stopped: ZeroDivisionError: division by zero", None, 1),
        ("system", OSError, "[Errno 28] No space left on device", None, 1),
    ],
)
def test_a_failed_stage_leaves_an_event_and_no_record(store, numbers, fail, raised, message, hint, exit_code):
    config, inputs = FakeConfig(fail=fail), {"numbers": numbers}
    with pytest.raises(raised):
        run_stage(STAGE, config, inputs, store=store, label="fakes/one", run="run-1")

    assert store.stage_record(stage_key(STAGE, config, inputs)) is None
    assert store.documents("runs/run-1/stages/") == []
    lines = events_path(store, "run-1", "fakes/one").read_text().splitlines()
    event = json.loads(lines[-1])
    assert (event["type"], event["error"], event["hint"]) == ("failed", message, hint)
    assert event["exit_code"] == exit_code
    assert ("traceback" in event) == (fail == "bug")
    assert list((store.local / "tmp").iterdir()) == []


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_stage_goes_on_where_it_stopped(store, numbers, stop_after):
    assert threading.current_thread() is threading.main_thread()  # where signals arrive
    handler, events = signal.getsignal(signal.SIGTERM), Events(stop_after)
    with pytest.raises(Interrupted):
        run(store, {"numbers": numbers}, reporter=events)
    assert events.types[-1] == "interrupted"
    assert events.steps == list(range(1, stop_after + 1))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert load_verified_record(store, stage_key(STAGE, FakeConfig(), {"numbers": numbers})) is None

    record, events = run(store, {"numbers": numbers})
    assert events.steps == list(range(stop_after + 1, 5))
    assert record.result == {"total": 10}


def test_a_stage_that_is_asked_again_while_it_cleans_up_cleans_up_whole(store, numbers, monkeypatch):
    remove, handler = shutil.rmtree, signal.getsignal(signal.SIGTERM)
    asked: list[str | Path] = []

    def ask_and_remove(folder: str | Path, **options: Any) -> None:
        if Path(folder, "out").exists():  # what the stage leaves, not what it finds
            asked.append(folder)
            os.kill(os.getpid(), signal.SIGTERM)
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", ask_and_remove)
    events = Events(stop_after=2)
    with pytest.raises(Interrupted):
        run(store, {"numbers": numbers}, reporter=events)
    assert len(asked) == 1
    assert events.types[-1] == "interrupted"
    assert list((store.local / "tmp").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler
    record, _ = run(store, {"numbers": numbers})
    assert record.result == {"total": 10}  # asked when all was done, it has ended well
    assert len(asked) == 2


def test_a_point_of_another_configuration_is_not_taken(store, numbers):
    with pytest.raises(Interrupted):
        run(store, {"numbers": numbers}, reporter=Events(stop_after=2))
    record, events = run(store, {"numbers": numbers}, FakeConfig(factor=2))

    assert events.steps == [1, 2, 3, 4]
    assert record.result == {"total": 20}


def test_wrong_inputs_are_named(store, numbers, tmp_path):
    table = store.put_folder(numbers_folder(tmp_path / "table", 1), "table").digest

    with pytest.raises(InputError, match=f"input 'numbers' of stage fake is a table .{table[:12]}., not a data"):
        run(store, {"numbers": table})
    with pytest.raises(InputError, match="input 'more' of stage fake is a table"):
        run(store, {"numbers": numbers, "more": [numbers, table]})
    with pytest.raises(InputError, match="stage fake needs the input 'numbers': a file"):
        run(store, {})
    with pytest.raises(InputError, match="no input 'number'\n  hint: it takes numbers, more"):
        run(store, {"number": numbers})
    with pytest.raises(StoreError, match="there is no artifact 000000000000"):
        run(store, {"numbers": "0" * 64})
    assert store.documents("stages/") == []


def test_a_run_has_a_document_for_each_stage_computed_or_recalled(store, numbers):
    def document(name: str) -> dict[str, Any]:
        found: dict[str, Any] = store.document(f"runs/{name}/stages/fakes/one.json")
        return found

    inputs = {"numbers": numbers}
    assert lookup_cached_stage(STAGE, FakeConfig(), inputs, store=store, label="fakes/one", run="first") is None
    record, _ = run(store, inputs, label="fakes/one", run="first")
    recalled = lookup_cached_stage(STAGE, FakeConfig(), inputs, store=store, label="fakes/one", run="second")

    assert recalled == record
    first, second = document("first"), document("second")
    assert (first["cached"], second["cached"]) == (False, True)
    assert {first["key"], second["key"]} == {record.key}
    assert (first["label"], first["stage"]) == ("fakes/one", "fake")
    assert first["finished"] - first["started"] == pytest.approx(first["seconds"])
    events = events_path(store, "second", "fakes/one").read_text().splitlines()
    assert [json.loads(line)["type"] for line in events] == ["start", "cached"]
