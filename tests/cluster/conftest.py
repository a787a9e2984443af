"""A Kubernetes cluster by KUBECONFIG, and a namespace for each test that Pod Security `restricted` guards."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kubernetes import client, config, dynamic
from kubernetes.dynamic.exceptions import NotFoundError, ResourceNotFoundError

from infra.testcluster.layout import GATEWAY, Layout
from tests.cluster.objects import Object, volume_objects
from tests.s3_server import S3Server, running_server

PATIENCE_S = 120


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the cluster tests out of every run that does not ask for them."""
    if "cluster" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("cluster") is not None]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


class Cluster:
    """The API server, in one namespace."""

    def __init__(self, api: dynamic.DynamicClient, namespace: str) -> None:
        self.namespace = namespace
        self._api, self._made = api, list[Object]()

    def need(self, api_version: str, kind: str) -> None:
        """Skip the test where the cluster does not have a kind."""
        with contextlib.suppress(ResourceNotFoundError):
            self._kind(api_version, kind)
            return
        pytest.skip(f"the cluster has no {kind} of {api_version}")

    def create(self, *objects: Object) -> None:
        """Create objects; `remove` deletes those that no namespace holds."""
        for each in objects:
            self._kind(each["apiVersion"], each["kind"]).create(body=each, namespace=self.namespace)
            self._made.append(each)

    def try_out(self, body: Object) -> None:
        """Let the API server judge an object without writing it."""
        self._kind(body["apiVersion"], body["kind"]).create(body=body, namespace=self.namespace, dry_run="All")

    def get(self, api_version: str, kind: str, name: str) -> Any:
        """An object as the API server has it, None where it is absent."""
        with contextlib.suppress(NotFoundError):
            return self._kind(api_version, kind).get(name=name, namespace=self.namespace).to_dict()
        return None

    def all(self, api_version: str, kind: str, **selectors: str) -> list[Any]:
        """The namespace's objects of a kind."""
        found = self._kind(api_version, kind).get(namespace=self.namespace, **selectors)
        return list(found.to_dict()["items"])

    def patch(self, api_version: str, kind: str, name: str, body: Object) -> None:
        """Merge values into an object."""
        content = "application/merge-patch+json"
        self._kind(api_version, kind).patch(body=body, name=name, namespace=self.namespace, content_type=content)

    def delete(self, api_version: str, kind: str, name: str, **options: Any) -> None:
        """Delete an object and what belongs to it."""
        body = {"propagationPolicy": "Background", **options}
        self._kind(api_version, kind).delete(name=name, namespace=self.namespace, body=body)

    def log(self, pod: str) -> str:
        """What a pod printed."""
        api = client.CoreV1Api(self._api.client)
        # Not read by the client, which would take a log for JSON where it can.
        answer = api.read_namespaced_pod_log(pod, self.namespace, _preload_content=False)
        return str(answer.data.decode(errors="replace"))

    def wait(self, what: str, probe: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
        """The first true value of a probe; the namespace's events are shown where there is none in time."""
        deadline = time.monotonic() + patience_s
        while not (value := probe()):
            if time.monotonic() > deadline:
                events = [f"{e['involvedObject']['name']}: {e['message']}" for e in self.all("v1", "Event")]
                pytest.fail("\n".join([f"not after {patience_s:g} s: {what}", *events[-20:]]))
            time.sleep(0.3)
        return value

    def wait_for_pod(self, name: str, phase: str = "Succeeded") -> Object:
        """Wait until a pod has a phase; one that ends otherwise fails the test with its log."""

        def ended() -> Object | None:
            pod: Object = self.get("v1", "Pod", name)
            if pod["status"].get("phase") == "Failed" != phase:
                pytest.fail(f"pod {name} failed:\n{self.log(name)}")
            return pod if pod["status"].get("phase") == phase else None

        found: Object = self.wait(f"pod {name} is {phase}", ended)
        return found

    def remove(self) -> None:
        """Delete the namespace and everything that the test created outside of it."""
        for each in reversed(self._made):
            kind = self._kind(each["apiVersion"], each["kind"])
            if not kind.namespaced:
                with contextlib.suppress(NotFoundError):
                    kind.delete(name=each["metadata"]["name"])
        self._kind("v1", "Namespace").delete(name=self.namespace)

    def _kind(self, api_version: str, kind: str) -> Any:
        return self._api.resources.get(api_version=api_version, kind=kind)


@pytest.fixture(scope="session")
def api() -> dynamic.DynamicClient:
    """The API server that KUBECONFIG names."""
    if not os.environ.get("KUBECONFIG"):
        pytest.fail("no cluster: use `make cluster-up test-cluster`, or set KUBECONFIG and run `make test-cluster`")
    return dynamic.DynamicClient(config.new_client_from_config())


@pytest.fixture
def cluster(api: dynamic.DynamicClient) -> Iterator[Cluster]:
    """A new namespace in which only pods run that Pod Security `restricted` lets in."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    api.resources.get(api_version="v1", kind="Namespace").create(body=namespace)
    cluster = Cluster(api, name)
    try:
        cluster.create(*volume_objects(name))
        cluster.wait("the default service account", lambda: cluster.get("v1", "ServiceAccount", "default"))
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture
def pod_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server that pods of the test cluster reach; a cluster by another KUBECONFIG cannot reach this machine."""
    if os.environ["KUBECONFIG"] != str(Layout.from_environment().kubeconfig):
        pytest.skip("pods of this cluster cannot reach a server of the tests")
    with running_server(lambda: tmp_path_factory.mktemp("s3"), host=GATEWAY) as server:
        yield server
