"""What a KFP task does with its arguments."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.core.base.errors import RecipeError
from components.core.runtime.kfp_task import execute, image
from components.core.store.manifest import Manifest
from components.core.store.store import Store, open_store
from tests.components.core.fake_stage import numbers_folder

SPEC = "tests.components.core.fake_stage:STAGE"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def digests(store: Store, tmp_path: Path) -> list[str]:
    return [store.put_folder(numbers_folder(tmp_path / f"n{i}", i, i), "data").digest for i in (1, 2, 3)]


def artifact(path: Path, **metadata: str) -> SimpleNamespace:
    """As much of KFP's artifacts as a task sees."""
    return SimpleNamespace(path=str(path), metadata=dict(metadata))


def arguments(
    store: Store, out: Path, config: dict[str, Any], sources: dict[str, Any], **inputs: Any
) -> dict[str, Any]:
    """The arguments of a component, as its body passes them on."""
    outputs = {name: artifact(out / name / "data") for name in ("total", "nothing")}
    texts = {"config": json.dumps(config), "sources": json.dumps(sources) if sources else ""}
    return {**texts, "label": "fakes", "store": store.uri, "run": "run-1", **inputs, **outputs}


def test_outputs_name_their_artifacts(store, digests, tmp_path):
    values = arguments(store, tmp_path, {"factor": 2}, {}, numbers=artifact(tmp_path, digest=digests[0]), more=None)
    execute(SPEC, values)

    total, nothing = values["total"], values["nothing"]
    manifest = Manifest.model_validate_json(Path(total.path).read_text())
    assert manifest.digest == total.metadata["digest"]
    assert (store.fetch(manifest.digest) / "total.json").read_text() == "4"
    assert total.metadata["store"] == store.uri
    assert store.stage_record(total.metadata["stage_key"]).outputs == {"total": manifest.digest}
    assert (nothing.metadata["digest"], Path(nothing.path).read_text()) == ("", "{}")
    assert store.document("runs/run-1/stages/fakes.json")["key"] == total.metadata["stage_key"]


def test_inputs_come_from_tasks_lists_of_tasks_and_sources(store, digests, tmp_path):
    collected = [artifact(tmp_path, digest=digest) for digest in digests[1:]]
    given = artifact(tmp_path)  # an optional artifact that nobody made has no digest
    values = arguments(store, tmp_path, {}, {"numbers": digests[0]}, numbers=given, more=collected)
    execute(SPEC, values)

    record = store.stage_record(values["total"].metadata["stage_key"])
    assert record.inputs == {"numbers": digests[0], "more": digests[1:]}
    assert record.result == {"total": 12}


def test_an_item_of_a_fan_out_is_part_of_configuration_and_label(store, digests, tmp_path):
    values = arguments(store, tmp_path, {}, {"numbers": digests[0]}, shard="1/2")
    execute(SPEC, values)

    key = values["total"].metadata["stage_key"]
    assert store.stage_record(key).config["shard"] == "1/2"
    assert store.document("runs/run-1/stages/fakes-1.json")["key"] == key


def test_placement_rides_along_and_changes_no_key(store, digests, tmp_path):
    keys = []
    for threads in (1, 3):
        config = {"factor": 1, "placement": {"threads": threads}}
        values = arguments(store, tmp_path, config, {"numbers": digests[0]})
        execute(SPEC, values)
        keys.append(values["total"].metadata["stage_key"])

    assert keys[0] == keys[1]
    assert store.document("runs/run-1/stages/fakes.json")["cached"]


def test_a_wrong_setting_is_named_with_the_label(store, digests, tmp_path):
    with pytest.raises(RecipeError, match=r"unknown key 'fakes\.factr'\n  hint: did you mean 'factor'"):
        execute(SPEC, arguments(store, tmp_path, {"factr": 1}, {"numbers": digests[0]}))


def test_images_come_from_the_registry_that_is_named(monkeypatch):
    monkeypatch.delenv("TESSERA_IMAGES", raising=False)
    name, _, version = image("sft").partition(":")
    assert (name, bool(version)) == ("tessera/sft", True)
    monkeypatch.setenv("TESSERA_IMAGES", "registry.example:5000/team")
    assert image("sft") == f"registry.example:5000/team/sft:{version}"
