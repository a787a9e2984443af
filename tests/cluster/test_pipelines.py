"""Compiled pipelines as pods. Their Workflows come from the stand-in, not from Kubeflow Pipelines."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp
import pytest
import yaml

from components.core.store.store import open_store
from infra.testcluster.services import REAL_POOL
from pipelines.cli import run_command
from pipelines.recipe.pod_settings import SETTINGS_CONFIG_MAP, STORE_KEYS, STORE_SECRET
from pipelines.records.runs import artifacts, run_names
from tests.cluster.argo import ARGO, ArgoWorkflows, host_additions, runner_rights
from tests.cluster.argo_workflow import SHOWN
from tests.cluster.conftest import Cluster
from tests.cluster.kfp_standin import KfpStandIn, running_standin
from tests.cluster.objects import SMALL, flavor, queues
from tests.cluster.toy_pipeline import compile_toy, shown
from tests.s3_server import S3Server, fresh_prefix

pytestmark = pytest.mark.cluster

KUEUE = "kueue.x-k8s.io/v1beta2"
ENDED = {"SUCCEEDED", "FAILED", "CANCELED"}
TRAINING = {"num_steps": 1, "global_batch_size": 2}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
RECIPE = {
    "name": "pods",
    "placement": {"threads": 1, "memory_gib": 2.0},
    "data": {"arithmetic": {"num_train": 60, "num_chats": 20, "num_validation": 10, "num_test": 10}},
    "parent_pretrain": {"shape": {**SHAPE, "intermediate_size": 32}, **TRAINING},
    "sft": TRAINING,
    **dict.fromkeys(("search", "distill", "pretrain", "rl", "eval", "deploy")),
}


@pytest.fixture
def standin(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpStandIn]:
    monkeypatch.setenv("HOME", str(tmp_path))  # kfp.Client writes a file there
    cluster.need(ARGO, "Workflow")
    cluster.create(*runner_rights())
    with running_standin(ArgoWorkflows(cluster), host_additions()) as standin:
        yield standin


def run_toy(standin: KfpStandIn, folder: Path, **parameters: str) -> Any:
    """Start the toy pipeline; returns the client and the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = kfp.Client(host=standin.url)
    pipeline = client.upload_pipeline(str(compile_toy(folder / "toy.yaml")), "toy")
    version = client.list_pipeline_versions(pipeline.pipeline_id).pipeline_versions[0]
    run = client.run_pipeline(
        client.create_experiment("tests").experiment_id,
        "toy-1",
        params=parameters,
        pipeline_id=pipeline.pipeline_id,
        version_id=version.pipeline_version_id,
    )
    return client, run.run_id


def end_state(cluster: Cluster, standin: KfpStandIn, client: Any, run: str) -> str:
    """State of a run that has ended; pytest shows what its tasks said."""
    cluster.wait("the run ends", lambda: client.get_run(run).state in ENDED)
    nodes = cluster.get(ARGO, "Workflow", standin.workflow_name(run))["status"].get("nodes", {})
    for each in nodes.values():
        sys.stdout.write(f"{each['displayName']} {each['type']} {each.get('phase')}: {each.get('message', '')}\n")
    return str(client.get_run(run).state)


def outputs(cluster: Cluster, workflow: str, task: str) -> dict[str, str]:
    """Output parameters of a task that succeeded."""
    nodes = cluster.get(ARGO, "Workflow", workflow)["status"]["nodes"].values()
    node = next(each for each in nodes if each["displayName"] == task and each["type"] == "Pod")
    return {each["name"]: each["value"] for each in node["outputs"]["parameters"]}


def test_a_pipeline_hands_parameters_on_and_collects_its_loop(
    cluster: Cluster, standin: KfpStandIn, tmp_path: Path
) -> None:
    cluster.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "toy-store"}, "stringData": {"key": "s"}}
    )
    client, run = run_toy(standin, tmp_path, first="a", last="z")
    assert end_state(cluster, standin, client, run) == "SUCCEEDED"
    metadata = shown(outputs(cluster, standin.workflow_name(run), "join")[SHOWN])
    assert metadata == {"joined": "0/2+1/2", "secret": "s"}


def test_a_failed_task_is_retried_and_the_exit_handler_runs(
    cluster: Cluster, standin: KfpStandIn, tmp_path: Path
) -> None:
    client, run = run_toy(standin, tmp_path, first="fail", last="z")
    assert end_state(cluster, standin, client, run) == "FAILED"
    nodes = cluster.get(ARGO, "Workflow", standin.workflow_name(run))["status"]["nodes"].values()
    attempts = [each for each in nodes if each["displayName"].startswith("write-2(")]
    assert [each["phase"] for each in attempts] == ["Failed", "Failed"]
    assert outputs(cluster, standin.workflow_name(run), "write")["out"] == "z"


def test_a_pod_deleted_by_force_comes_again(cluster: Cluster, standin: KfpStandIn, tmp_path: Path) -> None:
    client, run = run_toy(standin, tmp_path, first="a", last="z")
    (pod,) = cluster.wait("the first pod", lambda: cluster.all("v1", "Pod"))
    cluster.delete("v1", "Pod", pod["metadata"]["name"], gracePeriodSeconds=0)
    assert end_state(cluster, standin, client, run) == "SUCCEEDED"


def test_a_terminated_run_leaves_no_pod_running(cluster: Cluster, standin: KfpStandIn, tmp_path: Path) -> None:
    client, run = run_toy(standin, tmp_path, first="a", last="z")
    cluster.wait("the first pod", lambda: cluster.all("v1", "Pod"))
    client.terminate_run(run)
    cluster.wait("the run is canceled", lambda: client.get_run(run).state == "CANCELED")
    cluster.wait("no pod runs", lambda: not [p for p in cluster.all("v1", "Pod") if p["status"]["phase"] == "Running"])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of three stages, two of which train."""
    path = tmp_path / "pods.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture
def pod_store(cluster: Cluster, pod_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store; the namespace has its keys and its address where the chart puts them."""
    keys = {name: value for name, value in pod_s3.environment.items() if name in STORE_KEYS}
    settings = {"AWS_ENDPOINT_URL": pod_s3.endpoint, "AWS_REGION": "us-east-1"}
    cluster.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": STORE_SECRET}, "stringData": keys},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": SETTINGS_CONFIG_MAP}, "data": settings},
    )
    return fresh_prefix(pod_s3, monkeypatch)


def submit(recipe: Path, store: str, standin: KfpStandIn, cluster: Cluster, *options: str) -> int:
    command = ["submit", str(recipe), "--store", store, "--kfp", standin.url, "--namespace", cluster.namespace]
    return run_command([*command, "--watch", *options])


def only_run(store: str) -> str:
    (name,) = run_names(open_store(store))
    return name


def test_a_submitted_recipe_makes_the_digests_of_a_local_run(
    cluster: Cluster, standin: KfpStandIn, pod_store: str, recipe: Path, tmp_path: Path
) -> None:
    assert submit(recipe, pod_store, standin, cluster) == 0
    assert run_command(["run", str(recipe), "--store", str(tmp_path / "local")]) == 0
    on_cluster, local = open_store(pod_store), open_store(tmp_path / "local")
    made = artifacts(on_cluster, only_run(pod_store))
    assert len(made) >= 3
    assert made == artifacts(local, only_run(str(tmp_path / "local")))


def test_pods_of_a_run_are_admitted_through_the_queue_of_their_pool(
    cluster: Cluster, standin: KfpStandIn, pod_store: str, recipe: Path
) -> None:
    cluster.need(KUEUE, "ClusterQueue")
    name = f"{cluster.namespace}-{REAL_POOL}"
    quota = {"cpu": "1500m", "memory": "8Gi"}
    cluster.create(flavor(name, REAL_POOL), *queues(name, cluster.namespace, {name: quota}, local=REAL_POOL))
    assert submit(recipe, pod_store, standin, cluster, "--queues") == 0
    admitted = [each["status"]["admission"]["clusterQueue"] for each in cluster.all(KUEUE, "Workload")]
    assert len(admitted) >= 3
    assert set(admitted) == {name}


def test_a_recipe_that_asks_for_more_than_its_pool_has_is_refused_with_the_numbers(
    cluster: Cluster, standin: KfpStandIn, pod_store: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.need(KUEUE, "ClusterQueue")
    name = f"{cluster.namespace}-{REAL_POOL}"
    quota = {"cpu": SMALL["cpu"], "memory": "8Gi"}
    cluster.create(flavor(name, REAL_POOL), *queues(name, cluster.namespace, {name: quota}, local=REAL_POOL))
    assert submit(recipe, pod_store, standin, cluster, "--queues") == 2
    assert REAL_POOL in capsys.readouterr().err
    assert cluster.all(ARGO, "Workflow") == []
