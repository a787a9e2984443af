"""Compiled pipelines as pods. Their Workflows come from the stand-in, not from Kubeflow Pipelines."""

import sys
import warnings
from pathlib import Path
from typing import Any

import kfp
import pytest

from infra.testcluster.services import REAL_POOL
from pipelines.cli import run_command
from tests.cluster.api import Cluster
from tests.cluster.argo import ARGO
from tests.cluster.argo_workflow import SHOWN
from tests.cluster.conftest import digests
from tests.cluster.kfp_standin import KfpStandIn
from tests.cluster.objects import SMALL, flavor, queues
from tests.cluster.toy_pipeline import compile_toy, shown

pytestmark = pytest.mark.cluster

KUEUE = "kueue.x-k8s.io/v1beta2"
ENDED = {"SUCCEEDED", "FAILED", "CANCELED"}


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


def test_a_submitted_recipe_makes_the_digests_of_a_local_run(
    submission: list[str], pod_store: str, recipe: Path, tmp_path: Path
) -> None:
    assert run_command(submission) == 0
    assert run_command(["run", str(recipe), "--store", str(tmp_path / "local")]) == 0
    assert len(digests(pod_store)) >= 3
    assert digests(pod_store) == digests(tmp_path / "local")


def test_pods_of_a_run_are_admitted_through_the_queue_of_their_pool(cluster: Cluster, submission: list[str]) -> None:
    cluster.need(KUEUE, "ClusterQueue")
    name = f"{cluster.namespace}-{REAL_POOL}"
    quota = {"cpu": "1500m", "memory": "8Gi"}
    cluster.create(flavor(name, REAL_POOL), *queues(name, cluster.namespace, {name: quota}, local=REAL_POOL))
    assert run_command([*submission, "--queues"]) == 0
    admitted = [each["status"]["admission"]["clusterQueue"] for each in cluster.all(KUEUE, "Workload")]
    assert len(admitted) >= 3
    assert set(admitted) == {name}


def test_a_recipe_that_asks_for_more_than_its_pool_has_is_refused_with_the_numbers(
    cluster: Cluster, submission: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.need(KUEUE, "ClusterQueue")
    name = f"{cluster.namespace}-{REAL_POOL}"
    quota = {"cpu": SMALL["cpu"], "memory": "8Gi"}
    cluster.create(flavor(name, REAL_POOL), *queues(name, cluster.namespace, {name: quota}, local=REAL_POOL))
    assert run_command([*submission, "--queues"]) == 2
    assert REAL_POOL in capsys.readouterr().err
    assert cluster.all(ARGO, "Workflow") == []
