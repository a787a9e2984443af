"""What the chart installs, as the API server judges it, and what an upgrade and an uninstall leave alone."""

import json
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
from kubernetes.dynamic.exceptions import DynamicApiError, ResourceNotFoundError

from infra.chart import CHART, render
from tests.cluster.api import Cluster
from tests.cluster.objects import PYTHON, pod
from tests.helm.cases import CASES, EXAMPLES

pytestmark = pytest.mark.cluster

OTHER_PROJECTS = {"PodMonitor", "PrometheusRule", "ServiceMonitor"}
"""Kinds of Prometheus' operator, which the test cluster does not have."""


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
def test_the_api_server_takes_every_object(cluster: Cluster, values: dict[str, Any]) -> None:
    own = {**values, "namespace": {"name": cluster.namespace, "create": False}}
    objects = [each for each in render(own, namespace=cluster.namespace) if each["kind"] not in OTHER_PROJECTS]
    refused = []
    for each in objects:
        try:
            cluster.try_out(each)
        except ResourceNotFoundError:
            refused.append(f"{each['apiVersion']} {each['kind']} is not known")
        except DynamicApiError as error:
            refused.append(f"{each['kind']} {each['metadata']['name']}: {error}")
    assert refused == []
    assert objects


RELEASE = "tessera"
SECRET = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "tessera-store"},
    "stringData": {"key": "of a team"},
}
ASK = """
import json, ssl, sys, urllib.error, urllib.request
folder = "/var/run/secrets/kubernetes.io/serviceaccount"
context = ssl.create_default_context(cafile=f"{folder}/ca.crt")
def status(path):
    request = urllib.request.Request(f"https://kubernetes.default{path}")
    request.add_header("Authorization", f"Bearer {open(f'{folder}/token').read()}")
    try:
        return urllib.request.urlopen(request, context=context).status
    except urllib.error.HTTPError as error:
        return error.code
print(json.dumps({path: status(path) for path in sys.argv[1:]}))
"""


@pytest.fixture
def release(cluster: Cluster) -> Iterator[helm_python.Config]:
    """Helm in the namespace of the test; the release is removed, as some of its objects belong to no namespace."""
    with helm_python.Config(namespace=cluster.namespace) as helm:
        yield helm
        helm.uninstall(RELEASE, ignore_not_found=True)


def small(cluster: Cluster, **changes: Any) -> dict[str, Any]:
    """A small cluster with S3 and MLflow of its own, in the namespace of the test."""
    return {**EXAMPLES["small"], "namespace": {"name": cluster.namespace, "create": False}, **changes}


def names(cluster: Cluster, api_version: str, kind: str) -> set[str]:
    return {each["metadata"]["name"] for each in cluster.all(api_version, kind)}


def test_install_upgrade_and_uninstall_lose_no_data(cluster: Cluster, release: helm_python.Config) -> None:
    cluster.need("kueue.x-k8s.io/v1beta2", "ClusterQueue")
    cluster.need("trainer.kubeflow.org/v1alpha1", "TrainingRuntime")
    cluster.create(SECRET)
    before = names(cluster, "v1", "PersistentVolumeClaim")
    release.install(CHART, RELEASE, small(cluster), namespace=cluster.namespace)
    cluster.wait("two claims", lambda: len(names(cluster, "v1", "PersistentVolumeClaim") - before) == 2)
    claims = {each["metadata"]["uid"] for each in cluster.all("v1", "PersistentVolumeClaim")}
    release.upgrade(CHART, RELEASE, small(cluster, training={"scratch": "20Gi"}))
    upgraded = release.status(RELEASE)
    assert (upgraded["revision"], upgraded["status"]) == (2, "deployed")
    release.uninstall(RELEASE)
    cluster.wait("its servers are gone", lambda: not cluster.all("apps/v1", "StatefulSet"))
    assert "tessera-pipelines" not in names(cluster, "v1", "ServiceAccount")
    assert {each["metadata"]["uid"] for each in cluster.all("v1", "PersistentVolumeClaim")} == claims
    assert cluster.get("v1", "Secret", "tessera-store")["data"]
    release.install(CHART, RELEASE, small(cluster), namespace=cluster.namespace)
    cluster.wait("the servers are there", lambda: len(cluster.all("apps/v1", "StatefulSet")) == 2)
    assert {each["metadata"]["uid"] for each in cluster.all("v1", "PersistentVolumeClaim")} == claims


def test_a_pod_of_a_pipeline_reads_no_secret_and_no_other_namespace(
    cluster: Cluster, release: helm_python.Config
) -> None:
    cluster.need("trainer.kubeflow.org/v1alpha1", "TrainingRuntime")
    cluster.create(SECRET)
    plain = {"namespace": {"name": cluster.namespace, "create": False}}
    release.install(CHART, RELEASE, plain, namespace=cluster.namespace)
    own = f"/api/v1/namespaces/{cluster.namespace}"
    allowed = f"{own}/pods"
    refused = [f"{own}/secrets/tessera-store", f"{own}/secrets", "/api/v1/namespaces/default/pods", "/api/v1/nodes"]
    asks = pod("asks", [PYTHON, "-c", ASK, allowed, *refused])
    asks["spec"]["serviceAccountName"] = "tessera-pipelines"
    cluster.create(asks)
    cluster.wait_for_pod("asks")
    assert json.loads(cluster.log("asks")) == {allowed: 200, **dict.fromkeys(refused, 403)}
