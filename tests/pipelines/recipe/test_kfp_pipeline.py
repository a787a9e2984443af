"""The compiled pipeline: kept as a golden file, and true to the graph."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import environment_variables

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


def stages(compiled: list[dict[str, Any]]) -> dict[str, Any]:
    """The group of all stages."""
    (group,) = [task for task in tasks(compiled[0]["root"]) if task["taskInfo"]["name"] == "stages"]
    found: dict[str, Any] = compiled[0]["components"][group["componentRef"]["name"]]
    return found


def test_the_run_is_ended_whether_its_stages_succeeded_or_not(compiled: list[dict[str, Any]], graph: Graph) -> None:
    root = compiled[0]["root"]["dag"]["tasks"]
    assert {task["taskInfo"]["name"] for task in root.values()} == {"stages", "finish"}
    finish = root["finish"]
    assert finish["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert [root[name]["taskInfo"]["name"] for name in finish["dependentTasks"]] == ["stages"]
    labels = json.loads(finish["inputs"]["parameters"]["labels"]["runtimeValue"]["constant"])
    assert labels == [item.label for item in graph.items()]
    outputs = compiled[0]["components"]["comp-finish"]["outputDefinitions"]["artifacts"]
    assert {name: each["artifactType"]["schemaTitle"] for name, each in outputs.items()} == {"report": "system.HTML"}


def test_kfp_caches_nothing_and_parameters_are_store_and_run(compiled: list[dict[str, Any]]) -> None:
    pipeline = compiled[0]
    assert set(pipeline["root"]["inputDefinitions"]["parameters"]) == {"store", "run"}
    inner = [component for component in pipeline["components"].values() if "dag" in component]
    for task in [task for dag in [pipeline["root"], *inner] for task in tasks(dag)]:
        assert not task.get("cachingOptions", {}).get("enableCache", False)


def test_library_and_scores_are_made_by_one_fan_out_over_the_shards(compiled: list[dict[str, Any]]) -> None:
    loops = [task for task in tasks(stages(compiled)) if "parameterIterator" in task]
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


def executors(path: Path, graph: Graph, *, queues: bool) -> dict[str, Any]:
    """The settings of pods by executor, as the backend reads them."""
    compile_pipeline(graph, SOURCES, path, queues=queues)
    found: dict[str, Any] = list(yaml.safe_load_all(path.read_text()))[1]["platforms"]["kubernetes"]
    return dict(found["deploymentSpec"]["executors"])


def test_with_queues_the_pool_is_a_queue_and_no_node_is_selected(graph: Graph, tmp_path: Path) -> None:
    pods = executors(tmp_path / "pipeline.yaml", graph, queues=True)
    queues = {name: pod["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] for name, pod in pods.items()}
    assert (queues["exec-rl"], queues["exec-sft"], queues["exec-distill"]) == ("gpu", "cpu-large", "cpu")
    assert all("nodeSelector" not in pod for pod in pods.values())


def test_a_pod_asks_for_volumes_tolerations_and_a_priority(tmp_path: Path) -> None:
    place = {
        "gpus": 1,
        "shared_memory_gib": 2.5,
        "disk_gib": 40,
        "priority": "serving",
        "tolerations": ["team=blue:NoExecute", "spot"],
    }
    recipe = load_recipe(GOLDEN / "recipe.yaml", [f"eval.placement={json.dumps(place)}"])
    pods = executors(tmp_path / "pipeline.yaml", llama_nemotron(recipe), queues=True)
    placed, distill = pods["exec-eval"], pods["exec-distill"]
    assert placed["podMetadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "serving"
    assert placed["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert placed["tolerations"] == [
        {"key": "team", "operator": "Equal", "value": "blue", "effect": "NoExecute"},
        {"key": "spot", "operator": "Exists"},
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    ]
    volumes = {volume["mountPath"]: volume for volume in placed["emptyDirMounts"]}
    assert volumes["/dev/shm"] == {
        "volumeName": "shared-memory",
        "mountPath": "/dev/shm",
        "medium": "Memory",
        "sizeLimit": "2.5Gi",
    }
    assert volumes["/home/tessera"]["sizeLimit"] == "40Gi"
    assert "tolerations" not in distill
    assert "kueue.x-k8s.io/priority-class" not in distill["podMetadata"]["labels"]


def test_the_task_that_ends_a_run_is_as_urgent_as_its_stages(tmp_path: Path) -> None:
    stages = ("rl", "sft", "distill", "search")
    urgent = ['placement={"priority": "high"}', *(f"{stage}.placement=null" for stage in stages)]
    pods = executors(
        tmp_path / "pipeline.yaml", llama_nemotron(load_recipe(GOLDEN / "recipe.yaml", urgent)), queues=True
    )
    classes = {pod["podMetadata"]["labels"].get("kueue.x-k8s.io/priority-class") for pod in pods.values()}
    assert "exec-finish" in pods
    assert classes == {"high"}


def test_every_pod_has_the_environment_of_the_chart_and_is_not_root(compiled: list[dict[str, Any]]) -> None:
    pods = compiled[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert pods.keys() == compiled[0]["deploymentSpec"]["executors"].keys()
    for name, pod in pods.items():
        (settings,), (secret, mlflow) = pod["configMapAsEnv"], pod["secretAsEnv"]
        names = [key["envVar"] for key in settings["keyToEnv"]]
        assert (settings["configMapName"], settings["optional"]) == ("tessera-settings", True)
        assert names[:4] == ["MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_REGION", "TESSERA_METRICS_PORT"]
        assert names[4:] == ["HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"]
        assert (secret["secretName"], secret["optional"]) == ("tessera-store", True)
        assert [key["envVar"] for key in secret["keyToEnv"]] == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
        assert (mlflow["secretName"], mlflow["optional"]) == ("tessera-mlflow", True)
        assert all(hasattr(environment_variables, key["envVar"]) for key in mlflow["keyToEnv"])
        assert pod["securityContext"] == {"runAsNonRoot": True}
        container = compiled[0]["deploymentSpec"]["executors"][name]["container"]
        own = {each["name"]: each["value"] for each in container["env"]}
        (home,) = [each for each in pod["emptyDirMounts"] if each["mountPath"] == own["HOME"]]
        assert own["TESSERA_LOCAL"].startswith(f"{home['mountPath']}/")


def test_an_own_parent_comes_by_digest(compiled: list[dict[str, Any]]) -> None:
    distill = stages(compiled)["dag"]["tasks"]["distill"]["inputs"]
    parameters = distill["parameters"]
    assert parameters["teacher"]["runtimeValue"]["constant"] == SOURCES["parent"]
    assert parameters["student"]["taskOutputParameter"] == {"outputParameterKey": "child", "producerTask": "search"}
    assert parameters["corpus"]["taskOutputParameter"] == {"outputParameterKey": "corpus", "producerTask": "data"}
    assert "artifacts" not in distill


def test_every_task_is_tried_again_and_its_container_has_no_kfp(compiled: list[dict[str, Any]], graph: Graph) -> None:
    inner = [component for component in compiled[0]["components"].values() if "dag" in component]
    groups = {name for name, component in compiled[0]["components"].items() if "dag" in component}
    every = [task for dag in [compiled[0]["root"], *inner] for task in tasks(dag)]
    steps = [task for task in every if task["componentRef"]["name"] not in groups]
    assert [task["retryPolicy"]["maxRetryCount"] for task in steps] == [MAX_RETRIES] * len(steps)
    assert {task["taskInfo"]["name"] for task in steps} == {"finish", *(task.label for task in graph.tasks)}
    executors = dict(compiled[0]["deploymentSpec"]["executors"])
    assert executors.pop("exec-finish")["container"]["command"] == ["python", "-m", "pipelines.run.finish_run"]
    for executor in executors.values():
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
    assert not any(value.optional for value in spec.inputs.values())
    assert {key for key, value in spec.inputs.items() if value.type == "List"} == {
        key for key, declared in stage.inputs.items() if declared.many
    }
    models = {f"{key}_model" for key, declared in stage.outputs.items() if declared.kind == "model"}
    artifacts = {key: value.type for key, value in spec.outputs.items() if key not in stage.outputs}
    assert artifacts == {
        "stage_metrics": "system.Metrics@0.0.1",
        "stage_summary": "system.Markdown@0.0.1",
        **dict.fromkeys(models, "system.Model@0.0.1"),
    }
    assert set(spec.outputs) == {*stage.outputs, *artifacts}


def test_images_come_from_the_registry_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TESSERA_IMAGES", raising=False)
    name, _, version = image("serve").partition(":")
    assert (name, bool(version)) == ("tessera/serve", True)
    monkeypatch.setenv("TESSERA_IMAGES", "registry.example:5000/team")
    assert image("train") == f"registry.example:5000/team/train:{version}"
