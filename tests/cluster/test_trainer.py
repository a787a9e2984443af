import json

import pytest

from infra.testcluster.layout import POOL_LABEL
from infra.testcluster.services import REAL_POOL
from tests.cluster.api import Cluster
from tests.cluster.objects import PYTHON, SMALL, Object, pod_spec

pytestmark = pytest.mark.cluster

TRAINER = "trainer.kubeflow.org/v1alpha1"
MEET = """
import json, os, socket, time
for _ in range(100):  # the address of a peer is known when its pod runs
    try:
        address = socket.gethostbyname(os.environ["PET_MASTER_ADDR"])
        break
    except OSError:
        time.sleep(0.3)
print(json.dumps({"rank": int(os.environ["PET_NODE_RANK"]), "nodes": int(os.environ["PET_NNODES"]), "master": address}))
"""


def runtime() -> Object:
    """A runtime of torch jobs whose pods run on the real node."""
    spec = pod_spec([PYTHON])
    spec["containers"][0]["name"] = "node"
    spec["nodeSelector"] = {POOL_LABEL: REAL_POOL}
    job = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {"template": {"spec": spec}},
        },
    }
    return {
        "apiVersion": TRAINER,
        "kind": "TrainingRuntime",
        "metadata": {"name": "torch", "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {"mlPolicy": {"numNodes": 1, "torch": {}}, "template": {"spec": {"replicatedJobs": [job]}}},
    }


def test_a_train_job_of_two_nodes_gives_each_pod_its_rank_and_one_master(cluster: Cluster) -> None:
    cluster.need(TRAINER, "TrainJob")
    trainer = {
        "numNodes": 2,
        "numProcPerNode": 1,
        "command": [PYTHON, "-c", MEET],
        "resourcesPerNode": {"requests": SMALL},
    }
    job = {
        "apiVersion": TRAINER,
        "kind": "TrainJob",
        "metadata": {"name": "meet"},
        "spec": {"runtimeRef": {"kind": "TrainingRuntime", "name": "torch"}, "trainer": trainer},
    }
    cluster.create(runtime(), job)

    def complete() -> bool:
        conditions = cluster.get(TRAINER, "TrainJob", "meet").get("status", {}).get("conditions", [])
        return any(each["type"] == "Complete" and each["status"] == "True" for each in conditions)

    cluster.wait("the job is complete", complete)
    pods = cluster.all("v1", "Pod", label_selector="jobset.sigs.k8s.io/jobset-name=meet")
    said = [json.loads(cluster.log(pod["metadata"]["name"])) for pod in pods]
    assert sorted(each["rank"] for each in said) == [0, 1]
    assert {each["nodes"] for each in said} == {2}
    assert len({each["master"] for each in said}) == 1
