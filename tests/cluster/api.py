"""The API server of a cluster, in the namespace of one test."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client, dynamic
from kubernetes.dynamic.exceptions import NotFoundError, ResourceNotFoundError

from tests.cluster.objects import Object

PATIENCE_S = 300


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

    def evict(self, pod: str) -> None:
        """End a pod politely, as a drain does."""
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
        client.CoreV1Api(self._api.client).create_namespaced_pod_eviction(pod, self.namespace, eviction)

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

    def wait_for_pod(self, name: str, phase: str = "Succeeded", **patience: float) -> Object:
        """Wait until a pod has a phase; one that ends otherwise fails the test with its log."""

        def ended() -> Object | None:
            pod: Object = self.get("v1", "Pod", name)
            if pod["status"].get("phase") == "Failed" != phase:
                pytest.fail(f"pod {name} failed:\n{self.log(name)}")
            return pod if pod["status"].get("phase") == phase else None

        found: Object = self.wait(f"pod {name} is {phase}", ended, **patience)
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
