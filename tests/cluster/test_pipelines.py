"""Compiled pipelines as pods. Their Workflows come from the stand-in, not from Kubeflow Pipelines."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import kfp
import pytest
import yaml

from components.core.runtime.event_mirror import fetch_events
from components.core.runtime.events import EventFile
from components.core.runtime.runner import events_path
from components.core.store.store import Store, open_store
from infra.testcluster.layout import POOL_LABEL
from infra.testcluster.services import REAL_POOL
from pipelines.cli import run_command
from pipelines.records.runs import run_names, run_record
from pipelines.run.cluster_check import SERVICE_ACCOUNT
from tests.cluster.api import Cluster
from tests.cluster.argo import ARGO
from tests.cluster.argo_workflow import SHOWN
from tests.cluster.conftest import digests, running_pod, submitted
from tests.cluster.kfp_standin import KfpStandIn
from tests.cluster.objects import GPU, SMALL, Object, flavor, queues
from tests.cluster.toy_pipeline import compile_toy, shown
from tests.small_recipe import RECIPE

pytestmark = pytest.mark.cluster

KUEUE = "kueue.x-k8s.io/v1beta2"
TWO_NODES = {"cpu": "100", "memory": "1Ti", GPU: "16"}
LONG = {**RECIPE["parent_pretrain"], "num_steps": 1500}
"""Trains until a run of higher priority has come."""
MAX_OBJECT_BYTES = 1_500_000
"""The largest object that Kubernetes stores."""
ENDED = {"SUCCEEDED", "FAILED", "CANCELED"}


def run_toy(standin: KfpStandIn, folder: Path, *, shards: int = 2, **parameters: str) -> Any:
    """Start the toy pipeline; returns the client and the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = kfp.Client(host=standin.url)
    pipeline = client.upload_pipeline(str(compile_toy(folder / "toy.yaml", shards=shards)), "toy")
    version = client.list_pipeline_versions(pipeline.pipeline_id).pipeline_versions[0]
    run = client.run_pipeline(
        client.create_experiment("tests").experiment_id,
        "toy-1",
        params=parameters,
        pipeline_id=pipeline.pipeline_id,
        version_id=version.pipeline_version_id,
        service_account=SERVICE_ACCOUNT,
    )
    return client, run.run_id


def end_state(cluster: Cluster, standin: KfpStandIn, client: Any, run: str, **patience: float) -> str:
    """State of a run that has ended; pytest shows what its tasks said."""
    cluster.wait("the run ends", lambda: client.get_run(run).state in ENDED, **patience)
    nodes = cluster.get(ARGO, "Workflow", standin.workflow_name(run))["status"].get("nodes", {})
    for each in nodes.values():
        sys.stdout.write(f"{each['displayName']} {each['type']} {each.get('phase')}: {each.get('message', '')}\n")
    return str(client.get_run(run).state)


def running(pods: list[Object]) -> list[Object]:
    """Those pods whose containers run."""
    return [pod for pod in pods if pod["status"].get("phase") == "Running"]


def outputs(cluster: Cluster, workflow: str, task: str) -> dict[str, str]:
    """Output parameters of a task that succeeded."""
    nodes = cluster.get(ARGO, "Workflow", workflow)["status"]["nodes"].values()
    pods = (each for each in nodes if each["type"] == "Pod" and each["phase"] == "Succeeded")
    node = next(each for each in pods if each["displayName"].partition("(")[0] == task)  # the rest numbers attempts
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


def test_a_running_pod_deleted_by_force_comes_again(cluster: Cluster, standin: KfpStandIn, tmp_path: Path) -> None:
    client, run = run_toy(standin, tmp_path, first="slow", last="z")
    (pod,) = cluster.wait("the first pod", lambda: running(cluster.all("v1", "Pod")))
    cluster.delete("v1", "Pod", pod["metadata"]["name"], gracePeriodSeconds=0)
    assert end_state(cluster, standin, client, run) == "SUCCEEDED"


def test_a_terminated_run_leaves_no_pod_running(cluster: Cluster, standin: KfpStandIn, tmp_path: Path) -> None:
    client, run = run_toy(standin, tmp_path, first="a", last="z")
    cluster.wait("the first pod", lambda: cluster.all("v1", "Pod"))
    client.terminate_run(run)
    cluster.wait("the run is canceled", lambda: client.get_run(run).state == "CANCELED")
    cluster.wait("no pod runs", lambda: not running(cluster.all("v1", "Pod")))


def test_a_submitted_recipe_makes_the_digests_of_a_local_run(
    submission: list[str], pod_store: str, recipe: Path, tmp_path: Path
) -> None:
    assert run_command(submission) == 0
    assert run_command(["run", str(recipe), "--store", str(tmp_path / "local")]) == 0
    assert len(digests(pod_store)) >= 3
    assert digests(pod_store) == digests(tmp_path / "local")


def test_pods_of_a_run_wait_for_the_queue_of_their_pool(
    cluster: Cluster, submission: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.need(KUEUE, "ClusterQueue")
    name, shown = f"{cluster.namespace}-{REAL_POOL}", list[str]()
    quota = {"cpu": "1500m", "memory": "8Gi"}
    closed, local = queues(name, cluster.namespace, {name: quota}, local=REAL_POOL)
    closed["spec"]["stopPolicy"] = "Hold"
    cluster.create(flavor(name, REAL_POOL), closed, local)

    def says_why() -> bool:
        shown.append(capfd.readouterr().out)
        return f"data: waits in queue {REAL_POOL} of Kueue" in "".join(shown)

    with submitted(submission, "--queues") as run:
        cluster.wait("the run says why it waits", says_why)
        cluster.patch(KUEUE, "ClusterQueue", name, {"spec": {"stopPolicy": "None"}})
        assert run.wait() == 0
    admitted = [each["status"]["admission"]["clusterQueue"] for each in cluster.all(KUEUE, "Workload")]
    assert len(admitted) >= 3
    assert set(admitted) == {name}


def changed(submission: list[str], folder: Path, **changes: Any) -> list[str]:
    """The submission of another recipe."""
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({"name": "pods", **RECIPE, **changes}))
    return [submission[0], str(path), *submission[2:]]


def test_a_stage_with_gpus_lands_on_a_node_of_its_pool_and_its_run_can_be_cancelled(
    cluster: Cluster, submission: list[str], pod_store: str, tmp_path: Path
) -> None:
    cluster.need(KUEUE, "ClusterQueue")
    for pool, quota in {REAL_POOL: {"cpu": "1500m", "memory": "8Gi"}, "h100": TWO_NODES, "l40s": TWO_NODES}.items():
        name = f"{cluster.namespace}-{pool}"
        cluster.create(flavor(name, pool), *queues(name, cluster.namespace, {name: quota}, local=pool))
    sft = {**RECIPE["sft"], "placement": {"gpus": 2, "node_pool": "h100", "memory_gib": 64.0}}
    *command, watch = changed(submission, tmp_path, sft=sft)
    assert watch == "--watch"
    assert run_command([*command, "--queues"]) == 0
    pod = running_pod(cluster, "sft")  # on a simulated node, where nothing runs
    node = cluster.get("v1", "Node", pod["spec"]["nodeName"])
    assert node["metadata"]["labels"][POOL_LABEL] == "h100"
    assert pod["spec"]["containers"][-1]["resources"]["limits"][GPU] == "2"
    assert run_command([*command, "--queues", "--cancel"]) == 0
    store = open_store(pod_store)
    (name,) = run_names(store)
    assert run_record(store, name)["status"] == "interrupted"


def test_a_run_of_higher_priority_preempts_one_that_resumes(
    cluster: Cluster, submission: list[str], pod_store: str, tmp_path: Path
) -> None:
    cluster.need(KUEUE, "ClusterQueue")
    name, high = f"{cluster.namespace}-{REAL_POOL}", f"{cluster.namespace}-high"
    one_pod = {"cpu": "1200m", "memory": "4Gi"}
    cluster.create(
        flavor(name, REAL_POOL),
        *queues(name, cluster.namespace, {name: one_pod}, local=REAL_POOL),
        {"apiVersion": KUEUE, "kind": "WorkloadPriorityClass", "metadata": {"name": high}, "value": 1000},
    )
    (tmp_path / "long").mkdir()
    long = changed(submission, tmp_path / "long", name="long", parent_pretrain=LONG)
    urgent = changed(submission, tmp_path, name="urgent", placement={**RECIPE["placement"], "priority": high})
    store = open_store(pod_store)
    with submitted(long, "--queues") as run:
        cluster.wait("the run that is preempted trains", lambda: steps(store))
        assert run_command([*urgent, "--queues"]) == 0
        assert run.wait() == 0
    first, second = steps(store)
    assert (first[0], second[-1]) == (1, LONG["num_steps"])
    assert 1 < second[0] <= first[-1] + 1


def steps(store: Store) -> list[list[int]]:
    """Steps of the parent's training that the long run reported, of each of its pods that took one."""
    found: list[list[int]] = [[]]
    for name in run_names(store):
        if name.startswith("long"):
            fetch_events(store, name, "parent")
            for event in EventFile(events_path(store, name, "parent")).read():
                if event["type"] == "start":
                    found.append([])
                elif event["type"] == "progress":
                    found[-1].append(event["done"])
    return [each for each in found if each]


def test_a_loop_of_64_shards_goes_through(cluster: Cluster, standin: KfpStandIn, tmp_path: Path) -> None:
    client, run = run_toy(standin, tmp_path, shards=64, first="a", last="z")
    assert end_state(cluster, standin, client, run, patience_s=600) == "SUCCEEDED"
    workflow = cluster.get(ARGO, "Workflow", standin.workflow_name(run))
    assert sum(node["type"] == "Pod" for node in workflow["status"]["nodes"].values()) == 67
    assert len(json.dumps(workflow)) < MAX_OBJECT_BYTES


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
