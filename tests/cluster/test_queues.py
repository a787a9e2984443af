import pytest

from infra.testcluster.layout import POOL_LABEL
from infra.testcluster.manifests import KWOK_NODES
from infra.testcluster.services import REAL_POOL
from tests.cluster.api import Cluster
from tests.cluster.objects import GPU, SMALL, Object, flavor, queued_job, queues

pytestmark = pytest.mark.cluster

KUEUE = "kueue.x-k8s.io/v1beta2"
ONE_AT_A_TIME = {"cpu": "30m", "memory": "1Gi", GPU: "0"}
TWO_NODES = {"cpu": "100", "memory": "1Ti", GPU: "16"}
SLEEP = ["/usr/bin/sleep", "600"]


@pytest.fixture
def pools(cluster: Cluster) -> dict[str, str]:
    """Queues over the real node and two pools of simulated GPU nodes; the flavor of each pool."""
    cluster.need(KUEUE, "ClusterQueue")
    if not cluster.all("v1", "Node", label_selector=KWOK_NODES):
        pytest.skip("the cluster has no simulated nodes")
    names = {pool: f"{cluster.namespace}-{pool}" for pool in (REAL_POOL, "h100", "l40s")}
    cluster.create(*(flavor(name, pool) for pool, name in names.items()))
    quotas = {names[REAL_POOL]: ONE_AT_A_TIME, names["h100"]: TWO_NODES, names["l40s"]: TWO_NODES}
    cluster.create(*queues(cluster.namespace, cluster.namespace, quotas))
    return names


def in_pool(job: Object, pool: str) -> Object:
    job["spec"]["template"]["spec"]["nodeSelector"] = {POOL_LABEL: pool}
    return job


def job_status(cluster: Cluster, name: str) -> Object:
    return dict(cluster.get("batch/v1", "Job", name).get("status", {}))


def workload(cluster: Cluster, job: str) -> Object:
    """Kueue's record of a Job."""
    found = cluster.wait(
        f"Kueue knows {job}",
        lambda: [
            each
            for each in cluster.all(KUEUE, "Workload")
            if any(owner["name"] == job for owner in each["metadata"].get("ownerReferences", []))
        ],
    )
    return dict(found[0])


def quota_reserved(cluster: Cluster, job: str) -> Object:
    conditions = workload(cluster, job).get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == "QuotaReserved"), {})


def test_a_job_waits_until_another_has_freed_its_quota(cluster: Cluster, pools: dict[str, str]) -> None:
    cluster.create(in_pool(queued_job("first", "main", SLEEP), REAL_POOL))
    cluster.wait("first runs", lambda: job_status(cluster, "first").get("active") == 1)
    cluster.create(in_pool(queued_job("second", "main", ["/usr/bin/true"]), REAL_POOL))
    cluster.wait("second is refused quota", lambda: quota_reserved(cluster, "second").get("status") == "False")
    assert cluster.get("batch/v1", "Job", "second")["spec"]["suspend"] is True
    assert "cpu" in quota_reserved(cluster, "second")["message"]
    cluster.delete("batch/v1", "Job", "first")
    cluster.wait("second succeeds", lambda: job_status(cluster, "second").get("succeeded") == 1)


@pytest.mark.parametrize("pool", ["h100", "l40s"])
def test_a_gpu_job_lands_on_a_node_of_its_pool(cluster: Cluster, pools: dict[str, str], pool: str) -> None:
    job = in_pool(queued_job("gpu", "main", ["never-run"], resources={**SMALL, GPU: "4"}), pool)
    cluster.create(job)
    cluster.wait("the simulated pod ends", lambda: job_status(cluster, "gpu").get("succeeded") == 1)
    (pod,) = cluster.all("v1", "Pod", label_selector="job-name=gpu")
    node = cluster.get("v1", "Node", pod["spec"]["nodeName"])
    assert node["metadata"]["labels"][POOL_LABEL] == pool
    assigned = workload(cluster, "gpu")["status"]["admission"]["podSetAssignments"][0]["flavors"]
    assert set(assigned.values()) == {pools[pool]}


def test_a_job_that_asks_for_more_than_its_pool_has_is_never_started(cluster: Cluster, pools: dict[str, str]) -> None:
    cluster.create(in_pool(queued_job("huge", "main", ["never-run"], resources={**SMALL, GPU: "17"}), "h100"))
    cluster.wait("it is refused quota", lambda: quota_reserved(cluster, "huge").get("status") == "False")
    assert GPU in quota_reserved(cluster, "huge")["message"]
    assert cluster.all("v1", "Pod", label_selector="job-name=huge") == []


def test_a_job_of_higher_priority_preempts_one_that_comes_back(cluster: Cluster, pools: dict[str, str]) -> None:
    high = f"{cluster.namespace}-high"
    priority = {"metadata": {"name": high}, "value": 1000, "description": "preempts"}
    cluster.create({"apiVersion": KUEUE, "kind": "WorkloadPriorityClass", **priority})
    cluster.create(in_pool(queued_job("low", "main", SLEEP), REAL_POOL))
    cluster.wait("low runs", lambda: job_status(cluster, "low").get("active") == 1)
    cluster.create(in_pool(queued_job("high", "main", SLEEP, priority=high), REAL_POOL))
    cluster.wait("low is suspended", lambda: cluster.get("batch/v1", "Job", "low")["spec"]["suspend"])
    cluster.wait("high runs", lambda: job_status(cluster, "high").get("active") == 1)
    cluster.delete("batch/v1", "Job", "high")
    cluster.wait("low runs again", lambda: job_status(cluster, "low").get("active") == 1)
