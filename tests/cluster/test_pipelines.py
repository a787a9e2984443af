"""Compiled pipelines as pods. Their Workflows come from the stand-in, not from Kubeflow Pipelines."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp
import pytest

from tests.cluster.argo_workflow import SHOWN, PodAdditions, Values
from tests.cluster.conftest import Cluster
from tests.cluster.kfp_standin import KfpStandIn, running_standin
from tests.cluster.objects import ENVIRONMENT, IMAGE, Object, host_mounts, host_volumes
from tests.cluster.toy_pipeline import compile_toy, shown

pytestmark = pytest.mark.cluster

ARGO = "argoproj.io/v1alpha1"
ENDED = {"SUCCEEDED", "FAILED", "CANCELED"}


class ArgoWorkflows:
    """Argo on the cluster, in the namespace of the test."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def create(self, workflow: Values) -> str:
        name = f"{workflow['metadata'].pop('generateName')}{len(self._cluster.all(ARGO, 'Workflow'))}"
        workflow["metadata"]["name"] = name
        self._cluster.create(workflow)
        return name

    def get(self, name: str) -> Values | None:
        found: Values | None = self._cluster.get(ARGO, "Workflow", name)
        return found

    def terminate(self, name: str) -> None:
        self._cluster.patch(ARGO, "Workflow", name, {"spec": {"shutdown": "Terminate"}})


def runner_rights() -> list[Object]:
    """The service account of pipeline pods, with what Argo's containers in them need."""
    name = {"name": "pipeline-runner"}
    rbac = "rbac.authorization.k8s.io"
    rules = [{"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}]
    role = {"apiGroup": rbac, "kind": "Role", **name}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": name},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": name, "rules": rules},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": name,
            "roleRef": role,
            "subjects": [{"kind": "ServiceAccount", **name}],
        },
    ]


@pytest.fixture
def standin(cluster: Cluster) -> Iterator[KfpStandIn]:
    cluster.need(ARGO, "Workflow")
    cluster.create(*runner_rights())
    additions = PodAdditions(
        image=IMAGE, environment=ENVIRONMENT, mounts=tuple(host_mounts()), volumes=tuple(host_volumes())
    )
    with running_standin(ArgoWorkflows(cluster), additions) as standin:
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


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # the client writes a file there


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
    state = cluster.wait("the run ends", lambda: {client.get_run(run).state} & ENDED)
    assert state == {"SUCCEEDED"}
    metadata = shown(outputs(cluster, standin.workflow_name(run), "join")[SHOWN])
    assert metadata == {"joined": "0/2+1/2", "secret": "s"}


def test_a_failed_task_is_retried_and_the_exit_handler_runs(
    cluster: Cluster, standin: KfpStandIn, tmp_path: Path
) -> None:
    client, run = run_toy(standin, tmp_path, first="fail", last="z")
    state = cluster.wait("the run ends", lambda: {client.get_run(run).state} & ENDED)
    assert state == {"FAILED"}
    nodes = cluster.get(ARGO, "Workflow", standin.workflow_name(run))["status"]["nodes"].values()
    attempts = [each for each in nodes if each["displayName"].startswith("write-2(")]
    assert [each["phase"] for each in attempts] == ["Failed", "Failed"]
    assert outputs(cluster, standin.workflow_name(run), "write")["out"] == "z"


def test_a_pod_deleted_by_force_comes_again(cluster: Cluster, standin: KfpStandIn, tmp_path: Path) -> None:
    client, run = run_toy(standin, tmp_path, first="a", last="z")
    (pod,) = cluster.wait("the first pod", lambda: cluster.all("v1", "Pod"))
    cluster.delete("v1", "Pod", pod["metadata"]["name"], gracePeriodSeconds=0)
    state = cluster.wait("the run ends", lambda: {client.get_run(run).state} & ENDED)
    assert state == {"SUCCEEDED"}


def test_a_terminated_run_leaves_no_pod_running(cluster: Cluster, standin: KfpStandIn, tmp_path: Path) -> None:
    client, run = run_toy(standin, tmp_path, first="a", last="z")
    cluster.wait("the first pod", lambda: cluster.all("v1", "Pod"))
    client.terminate_run(run)
    cluster.wait("the run is canceled", lambda: client.get_run(run).state == "CANCELED")
    cluster.wait("no pod runs", lambda: not [p for p in cluster.all("v1", "Pod") if p["status"]["phase"] == "Running"])
