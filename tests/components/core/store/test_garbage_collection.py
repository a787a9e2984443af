"""Clean-ups never take what a run needs: while it goes on, after it was interrupted, and while others write."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import StoreError
from components.core.runtime.context import Interrupted
from components.core.runtime.runner import run_stage
from components.core.store import folder_store
from components.core.store import gc_lock as exclusion
from components.core.store.garbage_collection import collect_garbage
from components.core.store.gc_lock import COLLECTORS, WRITERS, Marker, collecting, writing
from components.core.store.manifest import hash_file
from components.core.store.store import StageRecord, Store, key_of, open_store
from components.core.store.verification import find_faults
from pipelines.records.runs import list_artifacts
from tests.components.core.fake_stage import STAGE, FakeConfig, numbers_folder
from tests.components.core.runtime.test_runner import Events
from tests.waiting import PATIENCE_S, wait_until

NO_GRACE_S = -5.0
"""Everything counts as old; servers tell time in whole seconds."""


@pytest.fixture
def open_here(store_uri: str, tmp_path: Path) -> Callable[[], Store]:
    """Opens the store as a fresh process would."""
    return lambda: open_store(store_uri, local=tmp_path / "local")


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def record_of(digest: str, number: int) -> StageRecord:
    values = {"stage": "made", "code": "c0de", "libraries": {}, "config": {"number": number}, "inputs": {}}
    return StageRecord.model_validate({**values, "key": key_of(**values), "outputs": {"total": digest}})  # type: ignore[arg-type]


def test_a_run_that_goes_on_loses_nothing(open_here: Callable[[], Store], tmp_path: Path) -> None:
    """A clean-up without any grace after each step of a stage, and after its interruption."""
    store = open_here()
    inputs = {"numbers": store.put_folder(numbers_folder(tmp_path / "numbers", 1, 2, 3, 4), "data").digest}
    store.put_document("runs/a/run.json", {"run": "a", "sources": inputs})

    class Cleaning(Events):
        def emit(self, event) -> None:
            collect_garbage(open_here(), grace_s=NO_GRACE_S)
            super().emit(event)

    with pytest.raises(Interrupted):
        run_stage(STAGE, FakeConfig(), inputs, store=store, reporter=Cleaning(stop_after=2))
    assert collect_garbage(open_here(), grace_s=NO_GRACE_S)["resume"] == 0
    events = Cleaning()
    record = run_stage(STAGE, FakeConfig(), inputs, store=open_here(), reporter=events)
    assert events.steps == [3, 4]
    assert record.result == {"total": 10}
    collect_garbage(open_here(), grace_s=NO_GRACE_S)
    assert find_faults(open_here()) == {}
    events = Cleaning()
    assert run_stage(STAGE, FakeConfig(), inputs, store=open_here(), reporter=events) == record
    assert events.types == ["start", "cached"]


def test_of_writers_and_clean_ups_at_once_nobody_loses_anything(open_here: Callable[[], Store], tmp_path: Path) -> None:
    """Contents that are garbage in one moment, and stored again and referred to in the next."""
    rounds = 12 if open_here().backend.folder is None else 30
    folders = [folder_of(tmp_path / str(number), own=str(number), shared="shared") for number in range(3)]
    stop, cleaned = threading.Event(), []

    def clean() -> None:
        try:
            while not stop.is_set():
                cleaned.append(collect_garbage(open_here(), grace_s=NO_GRACE_S, wait_s=PATIENCE_S)["blobs"])
        finally:
            stop.set()

    def write(seed: int) -> None:
        chance = random.Random(seed)
        for number in itertools.count():
            if stop.is_set() or (number >= rounds and sum(cleaned) > 3):  # there was something to lose
                return
            store = open_here()
            with store.writing():
                digest = store.put_folder(folders[chance.randrange(3)], "table").digest
                record = store.put_stage_record(record_of(digest, 1000 * seed + number))
            time.sleep(chance.random() / 50)
            open_here().verify(digest)
            store.backend.delete(f"stages/{record.key}.json")
            time.sleep(chance.random() / 10)

    with ThreadPoolExecutor(3) as pool:
        cleaner = pool.submit(clean)
        writers = [pool.submit(write, seed) for seed in range(2)]
        try:
            for writer in writers:
                writer.result()
        finally:
            stop.set()
        cleaner.result()
    collect_garbage(open_here(), grace_s=NO_GRACE_S)
    store = open_here()
    assert [path for prefix in ("blobs/", "artifacts/", WRITERS, COLLECTORS) for path in store.documents(prefix)] == []


def test_a_writer_waits_for_a_clean_up(open_here: Callable[[], Store], tmp_path: Path) -> None:
    source, done = folder_of(tmp_path / "source", a="a"), threading.Event()

    def write() -> None:
        open_here().put_folder(source, "data")
        done.set()

    with ThreadPoolExecutor(1) as pool:
        with collecting(open_here().backend, 0):
            writer = pool.submit(write)
            assert not done.wait(0.5)
        writer.result(timeout=PATIENCE_S)
    assert done.is_set()


def test_a_writer_waits_for_a_clean_up_that_lists_for_long_and_whose_marker_stays_young(
    open_here: Callable[[], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exclusion, "RENEW_S", 0.2)
    source, events, lists = folder_of(tmp_path / "source", a="a"), [], threading.Event()
    store = open_here()
    list_objects = store.backend.list

    def written() -> float:
        (marker,) = list_objects(COLLECTORS)
        return float(marker.modified)

    def is_younger(before: float) -> bool:
        return written() > before

    def list_slowly(prefix: str) -> Any:
        if prefix == "blobs/":
            lists.set()
            for _ in range(2):
                wait_until("the marker is renewed", partial(is_younger, written()))
            events.append("listed")
        return list_objects(prefix)

    def write() -> None:
        lists.wait()
        open_here().put_folder(source, "data")
        events.append("written")

    monkeypatch.setattr(store.backend, "list", list_slowly)
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        collect_garbage(store, grace_s=NO_GRACE_S)
        writer.result(timeout=PATIENCE_S)
    assert events == ["listed", "written"]


def test_a_clean_up_that_slept_removes_nothing_more(
    open_here: Callable[[], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_here()
    store.put_folder(folder_of(tmp_path / "source", a="a"), "data")
    list_objects = store.backend.list

    def list_and_sleep(prefix: str) -> Any:
        if prefix == "resume/":
            monkeypatch.setattr(time, "time", lambda now=time.time: now() + 121)
        return list_objects(prefix)

    monkeypatch.setattr(store.backend, "list", list_and_sleep)
    with pytest.raises(StoreError, match="marker of this clean-up is older than 120 s"):
        collect_garbage(store, grace_s=NO_GRACE_S)
    assert len(open_here().documents("blobs/")) == 1


def test_a_clean_up_gives_up_where_a_writer_stays(open_here: Callable[[], Store]) -> None:
    with open_here().writing(), pytest.raises(StoreError, match=r"a writer is at work in the store: writing/\w+"):
        collect_garbage(open_here(), wait_s=0.2)
    assert open_here().documents(COLLECTORS) == []
    collect_garbage(open_here(), wait_s=0)


def test_a_full_store_can_be_cleaned(
    open_here: Callable[[], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_here()
    store.put_folder(folder_of(tmp_path / "source", a="a"), "data")

    def full(*_: object) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(store.backend, "put", full)
    assert collect_garbage(store, grace_s=NO_GRACE_S)["artifacts"] == 1
    assert open_here().documents("blobs/") == []


def test_a_writer_inside_a_writer_is_one(open_here: Callable[[], Store], tmp_path: Path) -> None:
    store = open_here()
    with store.writing():
        store.put_folder(folder_of(tmp_path / "source", a="a"), "data")
        assert len(store.documents(WRITERS)) == 1
    assert store.documents(WRITERS) == []


def test_a_killed_writer_keeps_nobody_waiting(tmp_path: Path) -> None:
    uri = str(tmp_path / "store")
    script = (
        "import sys, time; from components.core.store.store import open_store\n"
        "with open_store(sys.argv[1]).writing(): print('inside', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, uri], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"inside\n"
        with pytest.raises(StoreError, match=f"{child.pid}"):
            collect_garbage(open_store(uri), wait_s=0)
        child.send_signal(signal.SIGKILL)
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        collect_garbage(open_store(uri), wait_s=0)  # not even waited for yet by its parent
        child.wait()
    assert open_store(uri).documents(WRITERS) == []


def test_markers_of_other_machines_count_until_they_are_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_store(tmp_path).backend
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(exclusion, "_host", lambda: "elsewhere")
        Marker(backend, WRITERS).write()
        Marker(backend, COLLECTORS).write()
    (writer,) = (tmp_path / "writing").iterdir()
    (collector,) = (tmp_path / "collecting").iterdir()
    with pytest.raises(StoreError, match="elsewhere"), collecting(backend, 0):
        pass
    old = time.time() - 24 * 3600 - 10
    os.utime(writer, (old, old))
    with collecting(backend, 0):
        pass
    os.utime(collector, (time.time() - 130, time.time() - 130))
    with writing(backend):
        pass
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and list(path.iterdir())] == []


def test_what_killed_processes_left_behind_goes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    young: list[Path] = []
    old: list[Path] = []
    for times, days in ((young, 0), (old, 2)):
        for path in (
            f"local/artifacts/{'0' * 64}.{days}.partial",
            f"resume/{'1' * 64}/.{days}.77.partial",
        ):
            (tmp_path / path).mkdir(parents=True)
            (tmp_path / path / "file").write_text("x")
            times.append(tmp_path / path)
        (tmp_path / "blobs").mkdir(exist_ok=True)
        (tmp_path / f"blobs/left#{days}").touch()
        times.append(tmp_path / f"blobs/left#{days}")
    for left in old:
        for each in (*left.glob("*"), left):
            os.utime(each, (time.time() - 2 * 86400,) * 2)
    collect_garbage(store)
    assert [path for path in old if path.exists()] == []
    assert [path for path in young if not path.exists()] == []


def test_stores_behind_s3_have_working_copies_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [open_store(uri).local for uri in ("s3://bucket/b", "s3://bucket/b/", "s3://bucket")]
    here = tmp_path / ".tessera" / "local" / "bucket"
    assert folders == [here / "b", here / "b", here]


def test_a_cached_stage_and_its_report_read_no_byte_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given files that are there already, a record that is verified, an input that is fetched, facts that are read."""
    uri = tmp_path / "store"
    source = numbers_folder(tmp_path / "numbers", 1, 2, 3, 4)
    (source / "large").write_bytes(bytes(1 << 20))

    def once() -> StageRecord:
        store = open_store(uri)
        inputs = {"numbers": store.put_folder(source, "data").digest}
        records = [
            run_stage(STAGE, FakeConfig(factor=factor), inputs, store=store, reporter=Events()) for factor in (1, 2, 1)
        ]
        for digest in (inputs["numbers"], records[0].outputs["total"]):
            store.verify(digest)
            store.fetch(digest)
        assert store.read(records[0].outputs["total"], "total.json") == b"10"
        return records[0]

    made = once()
    opened: list[str] = []

    def counted(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def reading(path: Path) -> Any:
            opened.append(path.name)
            return read(path)

        return reading

    monkeypatch.setattr(folder_store, "open_regular_file", counted(folder_store.open_regular_file))
    for module in ("artifact_store", "manifest"):
        monkeypatch.setattr(f"components.core.store.{module}.hash_file", counted(hash_file))
    assert once() == made
    blobs = {Path(path).name for path in open_store(uri).documents("blobs/")}
    assert sorted(name for name in opened if name in blobs) == sorted(blobs)
    given = [name for name in opened if name in ("large", "numbers.json", "total.json")]
    assert sorted(given) == ["large", "numbers.json"]  # of the user, never of a working copy


def test_the_work_of_upkeep_grows_with_what_is_stored(open_here: Callable[[], Store], tmp_path: Path) -> None:
    """Requests, counted: as many for each further artifact, however many there are."""

    def requests(do: Callable[[Store], object]) -> int:
        store, count = open_here(), 0

        def counting(ask: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*values: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                return ask(*values, **options)

            return counted

        for name in ("get", "entry", "stat", "delete", "list", "put"):
            monkeypatch.setattr(store.backend, name, counting(getattr(store.backend, name)))
        do(store)
        return count

    tasks: list[Callable[[Store], object]] = [
        lambda store: find_faults(store),
        lambda store: find_faults(store, contents=False),
        lambda store: collect_garbage(store, dry_run=True, grace_s=NO_GRACE_S),
        list_artifacts,
    ]
    counts = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(exclusion, "RENEW_S", 3600.0)  # no request by time
        for size in (4, 8, 12):
            for number in range(size - 4, size):
                store = open_here()
                digest = store.put_folder(folder_of(tmp_path / f"a{number}", own=str(number)), "table").digest
                store.put_stage_record(record_of(digest, number))
            counts.append([requests(task) for task in tasks])
    assert [c - b for b, c in zip(counts[1], counts[2], strict=True)] == [
        b - a for a, b in zip(counts[0], counts[1], strict=True)
    ]
