"""What `tessera store` tells of a store: where it is, what is in it, what is wrong with it, what was freed."""

import json
import os
from pathlib import Path

import pytest

from components.core.store.store import Store, open_store
from components.core.store.verification import find_faults
from pipelines.cli import run_command
from pipelines.records.runs import list_artifacts
from tests.pipelines.made_up_run import make_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = open_store(tmp_path / "store")
    make_run(made)
    return made


def test_path_prints_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["store", "path", "--store", "here"]) == 0
    assert run_command(["store", "path", "--store", "s3://bucket/prefix"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "here"), "s3://bucket/prefix"]


def test_every_artifact_is_listed_with_its_makers_and_roles(store: Store) -> None:
    found = {artifact["digest"]: artifact for artifact in list_artifacts(store)}
    assert set(found) == {Path(path).stem for path in store.documents("artifacts/")}
    record = store.stage_record(store.document("runs/demo-1/stages/rl.json")["key"])
    assert record is not None
    policy = found[record.outputs["policy"]]
    manifest = store.manifest(policy["digest"])
    assert (policy["kind"], policy["files"], policy["bytes"]) == ("model", len(manifest.files), manifest.size)
    assert {"stage": "rl", "output": "policy", "key": record.key} in policy["made_by"]
    assert "demo-1/rl" in policy["roles"]


def test_the_commands_say_it_in_words_and_json(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--store", store.uri]
    assert run_command(["store", "list", *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == list_artifacts(store)
    assert run_command(["store", "list", *where]) == 0
    assert "rl.policy" in capsys.readouterr().out
    assert run_command(["store", "verify", *where]) == 0
    assert capsys.readouterr().out == "everything is whole\n"


def test_verify_names_what_is_damaged_and_fails(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    blob = Path(store.uri, store.documents("blobs/")[0])
    blob.chmod(0o644)
    data = blob.read_bytes()
    blob.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    (store.backend.folder or Path()).joinpath("runs/demo-1/run.json").write_text("{}")
    assert run_command(["store", "verify", "--store", store.uri, "--json"]) == 1
    damage = json.loads(capsys.readouterr().out)
    assert {blob.name, "runs/demo-1/run.json"} < set(damage)
    assert run_command(["store", "verify", "--store", store.uri]) == 1
    told = capsys.readouterr().out
    assert blob.name in told
    assert all(digest in told for digest in damage)


def test_the_contents_of_files_can_be_left_unread(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    blob = Path(store.uri, store.documents("blobs/")[0])
    blob.chmod(0o644)
    data = blob.read_bytes()
    blob.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert run_command(["store", "verify", "--store", store.uri, "--manifests"]) == 0
    os.truncate(blob, len(data) - 1)
    assert run_command(["store", "verify", "--store", store.uri, "--manifests"]) == 1


def test_an_output_of_the_wrong_kind_is_a_fault_of_its_record(
    store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Somebody who can seal has written another artifact into a record."""
    record = store.stage_record(store.document("runs/demo-1/stages/rl.json")["key"])
    assert record is not None
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("{}\n")
    other = store.put_folder(tmp_path / "rows", "data").digest
    store.backend.delete(f"stages/{record.key}.json")
    store.put_stage_record(record.model_copy(update={"outputs": record.outputs | {"policy": other}}))
    assert run_command(["store", "verify", "--store", store.uri, "--json"]) == 1
    damage = json.loads(capsys.readouterr().out)
    assert list(damage) == [record.key]
    assert damage[record.key].endswith(f"has the data {other[:12]} as policy of rl")


def test_gc_says_what_it_freed(store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "file").write_text("twelve bytes")
    store.put_folder(tmp_path / "lost", "data")
    for path in (*store.documents("artifacts/"), *store.documents("blobs/")):
        os.utime(Path(store.uri, path), (0, 0))
    for options, word in ((["--dry-run"], "would remove"), ([], "removed")):
        assert run_command(["store", "gc", "--store", store.uri, *options]) == 0
        assert capsys.readouterr().out.startswith(f"{word} 1 artifacts, 1 blobs, 12 bytes, 0 copies")
    assert find_faults(store) == {}
