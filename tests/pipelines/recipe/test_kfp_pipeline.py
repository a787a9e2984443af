"""The compiled pipeline: kept as a golden file, and true to the graph."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.recipe.graph import Graph
from pipelines.recipe.kfp_pipeline import MAX_RETRIES, VALUES, compile_pipeline, component, image
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.registry import STAGES, find_stage
from pipelines.recipe.schema import load_recipe

GOLDEN = Path(__file__).parent / "golden"
SOURCES = {"parent": "5" * 64}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return llama_nemotron(load_recipe(GOLDEN / "recipe.yaml"))


@pytest.fixture(scope="module")
def compiled(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_pipeline(graph, SOURCES, path, run_label="golden-1")
    return list(yaml.safe_load_all(path.read_text()))


def normalised(documents: list[dict[str, Any]]) -> str:
    """The documents without versions and digests, which change without a change of the pipeline."""
    text = yaml.safe_dump_all(documents, width=120)
    text = re.sub(r"sdkVersion: .*", "sdkVersion: …", text)
    text = re.sub(r"(image: tessera/\w+):\S+", r"\1:…", text)
    return re.sub(r"(recipe-digest: |Recipe golden, )'?[0-9a-f]{12}'?", r"\1…", text)


def test_golden_pipeline_is_fresh(compiled: list[dict[str, Any]], renew_golden: bool) -> None:
    path = GOLDEN / "pipeline.yaml"
    if renew_golden:
        path.write_text(normalised(compiled))
    assert path.read_text() == normalised(compiled), "make golden"


def tasks(dag: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from dag["dag"]["tasks"].values()


def test_kfp_caches_nothing_and_parameters_are_store_and_run(compiled: list[dict[str, Any]]) -> None:
    pipeline = compiled[0]
    assert set(pipeline["root"]["inputDefinitions"]["parameters"]) == {"store", "run"}
    inner = [component for component in pipeline["components"].values() if "dag" in component]
    for task in [task for dag in [pipeline["root"], *inner] for task in tasks(dag)]:
        assert not task.get("cachingOptions", {}).get("enableCache", False)


def test_library_and_scores_are_made_by_one_fan_out_over_the_shards(compiled: list[dict[str, Any]]) -> None:
    loops = [task for task in tasks(compiled[0]["root"]) if "parameterIterator" in task]
    assert [json.loads(loop["parameterIterator"]["items"]["raw"]) for loop in loops] == [["0/3", "1/3", "2/3"]]
    shard = compiled[0]["components"][loops[0]["componentRef"]["name"]]
    assert [task["taskInfo"]["name"] for task in tasks(shard)] == ["search/library", "search/scores"]


def test_placement_becomes_node_pool_gpus_and_labels(compiled: list[dict[str, Any]]) -> None:
    platform = compiled[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert platform["exec-rl"]["nodeSelector"]["labels"] == {"tessera.dev/pool": "gpu"}
    labels = platform["exec-search-library"]["podMetadata"]["labels"]
    assert (labels["tessera.dev/stage"], labels["tessera.dev/run"]) == ("search.library", "golden-1")
    resources = compiled[0]["deploymentSpec"]["executors"]["exec-rl"]["container"]["resources"]
    assert resources["accelerator"]["resourceCount"] == "2"


def test_an_own_parent_comes_by_digest(compiled: list[dict[str, Any]]) -> None:
    distill = compiled[0]["root"]["dag"]["tasks"]["distill"]["inputs"]
    parameters = distill["parameters"]
    assert parameters["teacher"]["runtimeValue"]["constant"] == SOURCES["parent"]
    assert parameters["student"]["taskOutputParameter"] == {"outputParameterKey": "child", "producerTask": "search"}
    assert parameters["corpus"]["taskOutputParameter"] == {"outputParameterKey": "corpus", "producerTask": "data"}
    assert "artifacts" not in distill


def test_every_task_is_tried_again_and_its_container_has_no_kfp(compiled: list[dict[str, Any]], graph: Graph) -> None:
    inner = [component for component in compiled[0]["components"].values() if "dag" in component]
    steps = [task for dag in [compiled[0]["root"], *inner] for task in tasks(dag) if "parameterIterator" not in task]
    assert [task["retryPolicy"]["maxRetryCount"] for task in steps] == [MAX_RETRIES] * len(steps)
    assert {task["taskInfo"]["name"] for task in steps} == {task.label for task in graph.tasks}
    for executor in compiled[0]["deploymentSpec"]["executors"].values():
        container = executor["container"]
        assert container["command"] == [
            "python",
            "-m",
            "components.core.runtime.stage_command",
            container["command"][3],
        ]
        assert "kfp" not in json.dumps(container)
        at = container["args"].index("--retries")
        assert container["args"][at + 1] == str(MAX_RETRIES)


@pytest.mark.parametrize("name", STAGES)
def test_every_component_takes_and_makes_what_its_stage_declares(name: str) -> None:
    made: Any = component(name)
    spec, stage = made.component_spec, find_stage(name)
    shard = {"shard"} if "shard" in stage.config.model_fields else set()
    assert set(spec.inputs) == {*VALUES, *shard, *stage.inputs}
    assert {key for key, value in spec.inputs.items() if value.optional} == set(stage.inputs)
    assert {key for key, value in spec.inputs.items() if value.type == "List"} == {
        key for key, declared in stage.inputs.items() if declared.many
    }
    assert set(spec.outputs) == set(stage.outputs)


def test_images_come_from_the_registry_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TESSERA_IMAGES", raising=False)
    name, _, version = image("search-library").partition(":")
    assert (name, bool(version)) == ("tessera/search", True)
    monkeypatch.setenv("TESSERA_IMAGES", "registry.example:5000/team")
    assert image("sft") == f"registry.example:5000/team/sft:{version}"
