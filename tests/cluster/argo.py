"""Argo Workflows on the cluster, as the stand-in for Kubeflow Pipelines uses it."""

from infra.chart import render
from pipelines.run.cluster_check import SERVICE_ACCOUNT
from tests.cluster.api import Cluster
from tests.cluster.argo_workflow import PodAdditions, Values
from tests.cluster.objects import ENVIRONMENT, IMAGE, Object, host_mounts, host_volumes

ARGO = "argoproj.io/v1alpha1"


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


def pipeline_rights(namespace: str) -> list[Object]:
    """The chart's service account of pipeline pods, with its rights."""
    values = {"namespace": {"name": namespace, "create": False}}
    kinds = {"ServiceAccount", "Role", "RoleBinding"}
    objects = [each for each in render(values, namespace=namespace) if each["kind"] in kinds]
    return [each for each in objects if each["metadata"]["name"] == SERVICE_ACCOUNT]


def host_additions() -> PodAdditions:
    """What every pod of a pipeline gets on the test cluster, in the place of an image of the project."""
    return PodAdditions(
        image=IMAGE, environment=ENVIRONMENT, mounts=tuple(host_mounts()), volumes=tuple(host_volumes())
    )
