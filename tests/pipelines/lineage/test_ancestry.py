import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from components.core.base.errors import InputError
from components.core.store.store import Store
from pipelines.lineage.ancestry import LineageGraph, artifact_tree, find_artifact
from pipelines.records.runs import artifacts


@pytest.fixture(scope="module")
def store(made_up_store: Store) -> Store:
    return made_up_store


def test_a_model_leads_down_to_its_data_with_digests_of_artifact_and_code(store: Store) -> None:
    roles = artifacts(store, "demo-1")
    found = LineageGraph(store).of_artifact(roles["rl"])
    policy = store.stage_record(store.document("runs/demo-1/stages/rl.json")["key"])
    assert policy is not None
    assert (found["stage"], found["key"], found["code"]) == ("rl", policy.key, policy.code)
    sft = found["inputs"]["model"]
    assert (sft["digest"], sft["inputs"]["chats"]["digest"]) == (roles["sft"], roles["chats"])
    distilled = sft["inputs"]["model"]["inputs"]["model"]
    assert distilled["inputs"]["teacher"]["digest"] == roles["parent"]
    assert distilled["inputs"]["student"]["inputs"]["libraries[1]"]["stage"] == "search-library"


def test_data_leads_up_to_every_model_made_from_it(store: Store) -> None:
    roles = artifacts(store, "demo-1")
    made = {found["digest"] for found in LineageGraph(store).of_artifact(roles["chats"])["descendants"]}
    assert {roles["sft"], roles["rl"], roles["metrics"]} <= made
    assert not {roles["parent"], roles["child"], roles["distilled"], roles["pretrained"]} & made


def test_the_tree_shows_each_artifact_once_in_full(store: Store) -> None:
    roles = artifacts(store, "demo-1")
    out = io.StringIO()
    Console(file=out, width=200).print(artifact_tree(LineageGraph(store).of_artifact(roles["rl"])))
    lines = out.getvalue().splitlines()
    assert len([line for line in lines if roles["parent"][:12] in line and "by pretrain" in line]) == 1
    assert any(f"{roles['parent'][:12]}, see above" in line for line in lines)
    assert len(lines) < 60


def test_an_artifact_is_found_by_run_and_role_role_digest_run_or_folder(store: Store, tmp_path: Path) -> None:
    roles = artifacts(store, "demo-1")
    exported = tmp_path / "exported"
    shutil.copytree(store.fetch(roles["child"]), exported)
    assert find_artifact(store, "demo-1/child") == roles["child"]
    assert find_artifact(store, "child") == roles["child"]
    assert find_artifact(store, roles["child"][:10]) == roles["child"]
    assert find_artifact(store, str(exported)) == roles["child"]
    assert find_artifact(store, "demo-1") == roles["bundle"]
    with pytest.raises(InputError, match="no artifact 'chidl'"):
        find_artifact(store, "chidl")
