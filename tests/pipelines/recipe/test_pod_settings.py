"""What the pods of a stage of several nodes ask of a cluster: its task, and the `TrainJob` that the task makes."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from components.core.runtime.multi_node.train_job import MANIFEST, OWN_POD
from components.core.runtime.placement import Placement
from pipelines.recipe.kfp_pipeline import compile_pipeline, image
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.pod_settings import train_job
from pipelines.recipe.schema import load_recipe

RECIPE = Path(__file__).parent / "golden" / "recipe.yaml"
PLACE = {
    "nodes": 2,
    "processes": 4,
    "threads": 3,
    "gpus": 4,
    "memory_gib": 64.0,
    "node_pool": "h100",
    "priority": "training",
    "tolerations": ["spot"],
    "shared_memory_gib": 16.0,
}
LABELS = {"tessera.dev/run": "run-1", "tessera.dev/stage": "sft"}
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


def pod_patch(job: dict[str, Any]) -> dict[str, Any]:
    """What a `TrainJob` changes in the pods of the chart's runtime."""
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    return dict(replicated["template"]["spec"]["template"])


@pytest.mark.parametrize("queues", [True, False])
@pytest.mark.parametrize("place", [PLACE, {"nodes": 2}], ids=["gpu", "cpu"])
def test_a_train_job_is_one_of_trainer_with_a_pod_of_kubernetes(place: dict[str, Any], queues: bool) -> None:
    job = train_job(Placement.parse(place), LABELS, "image", queues=queues)
    model = TrainerV1alpha1TrainJob.from_dict(deepcopy(job))
    assert model is not None
    assert json.loads(model.to_json()) == job  # an unknown field would be lost
    container = {"name": "node", "image": "image", "resources": job["spec"]["trainer"]["resourcesPerNode"]}
    template = pod_patch(job)
    spec = {**template["spec"], "containers": [{**container, "env": job["spec"]["trainer"]["env"]}]}
    metadata = {**template["metadata"], "name": "p"}
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, "1.34", strict=True
    )


def test_the_placement_is_that_of_each_node_and_the_queue_that_of_all() -> None:
    job = train_job(Placement.parse(PLACE), LABELS, "image", queues=True)
    assert job["metadata"]["labels"] == {**LABELS, QUEUE: "h100", PRIORITY: "training"}
    trainer = job["spec"]["trainer"]
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("image", 2, 4)
    assert trainer["resourcesPerNode"] == {
        "requests": {"cpu": "12", "memory": "64Gi", "nvidia.com/gpu": "4"},
        "limits": {"nvidia.com/gpu": "4"},
    }
    pod = pod_patch(job)
    assert pod["metadata"]["labels"] == LABELS
    assert pod["spec"] == {
        "tolerations": [
            {"key": "spot", "operator": "Exists"},
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        ],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}],
    }
    unqueued = train_job(Placement.parse({**PLACE, "disk_gib": 40}), LABELS, "image", queues=False)
    assert pod_patch(unqueued)["spec"]["nodeSelector"] == {"tessera.dev/pool": "h100"}
    assert pod_patch(unqueued)["spec"]["volumes"][0] == {"name": "home", "emptyDir": {"sizeLimit": "40Gi"}}
    assert QUEUE not in unqueued["metadata"]["labels"]


@pytest.mark.parametrize("queues", [True, False])
def test_the_task_of_several_nodes_is_small_and_knows_its_train_job_and_its_pod(tmp_path: Path, queues: bool) -> None:
    graph = llama_nemotron(load_recipe(RECIPE, [f"sft.placement={json.dumps(PLACE)}"]))
    compile_pipeline(graph, {"parent": "5" * 64}, tmp_path / "pipeline.yaml", run_label="run-1", queues=queues)
    pipeline, platform = yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text())
    pod = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-sft"]
    container = pipeline["deploymentSpec"]["executors"]["exec-sft"]["container"]
    assert "accelerator" not in container["resources"]
    assert (container["resources"]["resourceCpuRequest"], container["resources"]["resourceMemoryRequest"]) == (
        "100m",
        "1Gi",
    )
    assert {"nodeSelector", "tolerations"}.isdisjoint(pod)
    assert {QUEUE, PRIORITY}.isdisjoint(pod["podMetadata"]["labels"])
    assert {each["name"]: each["fieldPath"] for each in pod["fieldPathAsEnv"]} == OWN_POD
    (text,) = [each["value"] for each in container["env"] if each["name"] == MANIFEST]
    labels = {key: value for key, value in pod["podMetadata"]["labels"].items() if key.startswith("tessera.dev/")}
    placement = next(task.placement for task in graph.tasks if task.label == "sft")
    assert json.loads(text) == train_job(placement, labels, image("train"), queues=queues)
