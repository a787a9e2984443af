"""Records, resume points, documents and upkeep of a store, in a folder and behind a real S3 server."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import CorruptArtifact
from components.core.store.artifact_store import blob_path
from components.core.store.checkpoint_store import write_checkpoint_manifest
from components.core.store.garbage_collection import collect_garbage
from components.core.store.gc_lock import Marker
from components.core.store.store import StageRecord, Store, key_of, open_store
from components.core.store.verification import find_faults


def opened(uri: str, tmp_path: Path, machine: str = "here") -> Store:
    """The store as a fresh process on a machine would open it."""
    return open_store(uri, local=tmp_path / "local" / machine)


@pytest.fixture
def store(store_uri: str, tmp_path: Path) -> Store:
    return opened(store_uri, tmp_path)


@pytest.fixture
def put(store: Store, tmp_path: Path) -> Callable[[str], str]:
    """Stores an artifact of two files, one of them the same in all."""

    def artifact(text: str) -> str:
        folder = tmp_path / "made" / text
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text(text)
        (folder / "shared").write_text("shared")
        return store.put_folder(folder, "data").digest

    return artifact


def record(seconds: float = 1.0, *, code: str = "c0de", **fields: dict[str, str | list[str]]) -> StageRecord:
    values: dict[str, Any] = {"stage": "sft", "config": {"steps": 3}, "code": code, "libraries": {"torch": "2"}}
    key = key_of(**values, inputs=fields.get("inputs", {}))
    return StageRecord.model_validate({"key": key, **values, "seconds": seconds, **fields})


KEY = record().key


def test_the_store_is_light_to_import() -> None:
    script = "import sys, components.core.store.store; print({'minio', 'urllib3', 'torch', 'arro3'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_a_stage_record_comes_back(store: Store, put: Callable[[str], str]) -> None:
    made = record(outputs={"tuned": put("a")}, inputs={"many": ["b", "c"]})
    assert store.stage_record(made.key) is None
    assert store.put_stage_record(made) == made
    assert store.stage_record(made.key) == made
    assert list(store.stage_records()) == [made]


def test_of_two_writers_of_one_key_all_see_the_same_winner(
    store_uri: str, tmp_path: Path, put: Callable[[str], str]
) -> None:
    records = [record(number, outputs={"tuned": put(str(number))}) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        winners = list(pool.map(lambda made: opened(store_uri, tmp_path).put_stage_record(made), records))
    assert winners == [opened(store_uri, tmp_path).stage_record(KEY)] * 6
    assert winners[0] in records


def test_a_record_whose_outputs_are_damaged_gives_way(store: Store, put: Callable[[str], str]) -> None:
    first, second = record(outputs={"tuned": put("a")}), record(outputs={"tuned": put("b")}, seconds=2.0)
    store.put_stage_record(first)
    store.backend.delete(blob_path(sha256(b"a").hexdigest()))
    assert store.put_stage_record(second) == second == store.stage_record(KEY)


def test_a_record_that_cannot_be_read_counts_as_absent(store: Store) -> None:
    store.put_text(f"stages/{KEY}.json", '{"key": "k", "sta')
    assert store.stage_record(KEY) is None
    assert list(store.stage_records()) == []
    assert store.put_stage_record(record()) == store.stage_record(KEY) == record()


def test_documents_are_replaced_and_listed(store: Store) -> None:
    assert store.document("runs/a/run.json") is None
    assert store.documents("runs/") == []
    for value in ({"status": "running"}, {"status": "succeeded"}):
        store.put_document("runs/a/run.json", value)
        assert store.document("runs/a/run.json") == value
    store.put_document("runs/a/stages/search/blocks-0.json", {"label": None})
    store.put_text("runs/ab/report.html", "<p>ü</p>")
    assert store.text("runs/ab/report.html") == "<p>ü</p>"
    assert store.text("runs/ab/none.html") is None
    assert store.documents("runs/a/") == ["runs/a/run.json", "runs/a/stages/search/blocks-0.json"]
    assert store.documents("runs/") == [*store.documents("runs/a/"), "runs/ab/report.html"]


def test_a_claim_has_one_winner(store_uri: str, tmp_path: Path) -> None:
    def claim(number: int) -> bool:
        return opened(store_uri, tmp_path).claim("runs/a/run.json", {"number": number})

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert won.count(True) == 1
    assert opened(store_uri, tmp_path).document("runs/a/run.json") == {"number": won.index(True)}
    assert not claim(9)


def point(store: Store, key: str, step: int, text: str = "state") -> Path:
    """A resume point as a stage would save and mirror it."""
    folder = store.resume_folder(key) / f"{step:09d}"
    (folder / "rank").mkdir(parents=True)
    (folder / "state.json").write_text(f"{text} {step}")
    (folder / "rank" / "empty").touch()
    write_checkpoint_manifest(folder)
    store.push_resume(key, folder)
    return folder


def test_a_resume_point_is_found_from_another_machine(store_uri: str, tmp_path: Path) -> None:
    here, there = opened(store_uri, tmp_path), opened(store_uri, tmp_path, "there")
    for step in (10, 20):
        point(here, "k", step)
    folder = there.resume_folder("k")
    assert (folder / "000000020" / "state.json").read_text() == "state 20"
    assert (folder / "000000020" / "rank" / "empty").read_bytes() == b""
    assert there.resume_folder("k") == folder
    here.drop_resume("k")
    assert here.documents("resume/") == []
    assert not list(opened(store_uri, tmp_path, "third").resume_folder("k").iterdir())


def test_only_the_newest_point_is_kept_away(s3_uri: str, tmp_path: Path) -> None:
    store = opened(s3_uri, tmp_path)
    for step in (10, 20):
        point(store, "k", step)
    assert {path.split("/")[2] for path in store.documents("resume/k/")} == {"000000020", "000000020.json"}


def test_a_damaged_point_is_passed_over(s3_uri: str, tmp_path: Path) -> None:
    store = opened(s3_uri, tmp_path)
    newer = store.resume_folder("k") / "000000020"
    point(store, "k", 10)
    older = {path: store.backend.get(path) or b"" for path in store.documents("resume/k/")}
    point(store, "k", 20)
    for path, data in older.items():  # a push that was killed before it dropped the older point
        store.backend.put(path, data)
    store.put_text("resume/k/000000020/state.json", "changed!")
    store.put_text("resume/k/000000030/state.json", "a push that was killed before its list")
    assert newer.is_dir()
    found = opened(s3_uri, tmp_path, "there").resume_folder("k")
    assert sorted(path.name for path in found.iterdir()) == ["000000010", "000000010.json"]


NO_GRACE_S = -5.0
"""Everything counts as old; servers tell time in whole seconds, so a second of slack."""


def test_gc_removes_what_nothing_refers_to(store: Store, put: Callable[[str], str]) -> None:
    made, read, source, lost = put("made"), put("read"), put("source"), put("lost")
    store.put_stage_record(record(outputs={"tuned": made}, inputs={"one": read, "many": [read]}))
    store.put_document("runs/a/run.json", {"run": "a", "sources": {"parent": source}})
    for digest in (made, lost):
        store.fetch(digest)
    before = store.documents("blobs/")
    would = collect_garbage(store, dry_run=True, grace_s=NO_GRACE_S)
    assert would == {"artifacts": 1, "blobs": 1, "bytes": 4, "copies": 1, "scratch": 0, "resume": 0}
    assert store.documents("blobs/") == before
    assert collect_garbage(store, grace_s=NO_GRACE_S) == would
    assert set(before) - set(store.documents("blobs/")) == {blob_path(sha256(b"lost").hexdigest())}
    assert [path.name for path in (store.local / "artifacts").iterdir()] == [made]
    assert find_faults(store) == {}
    for digest in (made, read, source):
        assert store.manifest(digest).digest == digest
    assert not any(collect_garbage(store, grace_s=NO_GRACE_S).values())


def test_gc_leaves_what_is_young(store: Store, put: Callable[[str], str]) -> None:
    store.fetch(put("young"))
    before = store.documents("blobs/")
    assert not any(collect_garbage(store).values())
    assert store.documents("blobs/") == before


def test_what_is_stored_again_counts_as_young(
    store: Store, put: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = put("again")
    written = max(blob.modified for blob in store.backend.list("blobs/"))
    monkeypatch.setattr(Marker, "now", written + 10.5)  # the time of the store, whenever it is asked
    assert collect_garbage(store, dry_run=True, grace_s=10.0)["blobs"] == 2
    time.sleep(1.1)  # servers tell time in whole seconds
    assert store.put_folder(tmp_path / "made" / "again", "data").digest == digest
    assert not any(collect_garbage(store, grace_s=10.0).values())
    store.verify(digest)


def test_gc_drops_resume_points_of_finished_stages_alone(store: Store) -> None:
    finished = record(code="finished")
    for key in (finished.key, "running"):
        point(store, key, 1)
    store.put_stage_record(finished)
    assert collect_garbage(store, grace_s=NO_GRACE_S)["resume"] == 1
    assert {path.split("/")[1] for path in store.documents("resume/")} == {"running"}


def test_gc_refuses_where_it_cannot_know_what_is_needed(store: Store, put: Callable[[str], str]) -> None:
    digest = put("made")
    store.put_stage_record(record(outputs={"tuned": digest}))
    store.put_text(f"artifacts/{digest}.json", "{")
    with pytest.raises(CorruptArtifact, match=digest[:12]):
        collect_garbage(store, grace_s=NO_GRACE_S)
    assert len(store.documents("blobs/")) == 2


def test_gc_removes_half_written_files(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    store.claim("runs/a/run.json", {})
    left = [tmp_path / "store" / "runs" / "a" / name for name in ("run.json#1", ".partial-x")]
    for partial in left:
        partial.touch()
        os.utime(partial, (0, 0))
    assert store.documents("runs/") == ["runs/a/run.json"]
    collect_garbage(store, grace_s=NO_GRACE_S)
    assert not any(partial.exists() for partial in left)


def test_verify_all_reports_what_is_referred_to_and_missing(store: Store, put: Callable[[str], str]) -> None:
    digest, gone = put("whole"), "9" * 64
    store.put_stage_record(record(outputs={"tuned": digest, "lost": gone}))
    assert find_faults(store) == {gone: f"there is no artifact {gone[:12]} in {store.uri}"}
