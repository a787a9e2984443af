"""A run goes on to the same digests after what a cluster does to it. Its Workflow comes from the stand-in."""

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.testcluster.build import MODULE_SETS
from infra.testcluster.layout import GATEWAY, Layout
from infra.testcluster.runner import Runner
from infra.testcluster.services import core_services
from pipelines.cli import run_command
from pipelines.recipe.pod_settings import SETTINGS_CONFIG_MAP
from tests.cluster.api import Cluster
from tests.cluster.conftest import digests, running_pod, submitted
from tests.cluster.objects import Object
from tests.mlflow_server import MlflowServer, running_mlflow
from tests.s3_server import S3Server
from tests.small_recipe import write_recipe

pytestmark = pytest.mark.cluster

STAGES = ("data", "parent", "sft")


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the recipe makes on this machine."""
    folder = tmp_path_factory.mktemp("local")
    write_recipe(folder, "pods")
    assert run_command(["run", str(folder / "pods.yaml"), "--store", str(folder / "store")]) == 0
    return digests(folder / "store")


def test_a_run_whose_pods_are_all_killed_once_ends_the_same(
    cluster: Cluster, submission: list[str], pod_store: str, local: dict[str, str]
) -> None:
    with submitted(submission) as run:
        for stage in STAGES:
            cluster.delete("v1", "Pod", running_pod(cluster, stage)["metadata"]["name"], gracePeriodSeconds=0)
        assert run.wait() == 0
    assert digests(pod_store) == local


def waiting(cluster: Cluster, stage: str) -> list[Object]:
    """Pods of a stage that no node has taken."""
    pods = cluster.all("v1", "Pod", label_selector=f"tessera.dev/stage={stage}")
    return [pod for pod in pods if pod["status"].get("phase") == "Pending" and not pod["spec"].get("nodeName")]


def test_a_drained_node_ends_the_pod_and_not_the_run(
    cluster: Cluster, submission: list[str], pod_store: str, local: dict[str, str]
) -> None:
    with submitted(submission) as run:
        pod = running_pod(cluster, "parent")
        node = pod["spec"]["nodeName"]
        cluster.patch("v1", "Node", node, {"spec": {"unschedulable": True}})
        try:
            cluster.evict(pod["metadata"]["name"])
            cluster.wait("another pod waits for a node", lambda: waiting(cluster, "parent"))
        finally:
            cluster.patch("v1", "Node", node, {"spec": {"unschedulable": None}})
        assert run.wait() == 0
    assert digests(pod_store) == local


def restart_api_server() -> None:
    """Kill the API server of the test cluster, and start it again."""
    layout = Layout.from_environment()
    runner = Runner(layout, [modules.folder(layout) for modules in MODULE_SETS])
    service = next(each for each in core_services(layout, []) if each.name == "kube-apiserver")
    process = runner.process(service)
    assert process is not None
    process.kill()
    process.wait()
    runner.start(service)


def test_a_run_survives_a_killed_api_server_and_a_killed_store(
    cluster: Cluster, submission: list[str], pod_store: str, pod_s3: S3Server, local: dict[str, str]
) -> None:
    with submitted(submission) as run:
        running_pod(cluster, "data")
        pod_s3.kill()
        assert pod_s3.start()
        running_pod(cluster, "parent")
        restart_api_server()
        assert run.wait() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of connections of the stand-in that the kill cut off
        gc.collect()
    assert digests(pod_store) == local


@pytest.fixture
def mlflow_server(
    cluster: Cluster, pod_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MlflowServer]:
    """An MLflow server that pods reach by the setting of the chart."""
    with running_mlflow(tmp_path, host=GATEWAY) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        cluster.patch("v1", "ConfigMap", SETTINGS_CONFIG_MAP, {"data": {"MLFLOW_TRACKING_URI": server.uri}})
        yield server


def test_mlflow_has_one_run_with_a_nested_run_a_stage_also_where_its_server_was_killed(
    cluster: Cluster, submission: list[str], mlflow_server: MlflowServer
) -> None:
    with submitted(submission) as run:
        running_pod(cluster, "parent")
        mlflow_server.kill()
        mlflow_server.start()
        assert run.wait() == 0
    client = MlflowClient(mlflow_server.uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    parents = [each for each in runs if "mlflow.parentRunId" not in each.data.tags]
    assert len(parents) == 1
    nested = {each.info.run_name: each.info.status for each in runs if each not in parents}
    assert nested == dict.fromkeys(STAGES, "FINISHED")
    assert {each.data.tags.get("mlflow.parentRunId") for each in runs if each not in parents} == {
        parents[0].info.run_id
    }
