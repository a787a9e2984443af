"""Stands in for a real Kubernetes API server: the reads that a check of a cluster makes, from a table of answers."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.json_server import running_json_server, write_kubeconfig

REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


class FakeKubernetes:
    """Answers by path; `None` is one that the user may not read, and a path that is missing is not there.

    Attributes:
        answers: JSON by path.
        rights: pairs of resource and verb that the user has.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.rights: set[tuple[str, str]] = set()

    def groups(self, *names: str) -> None:
        """Serve these groups of APIs."""
        version = {"groupVersion": "v1", "version": "v1beta2"}
        self.answers["/apis/"] = {
            "groups": [{"name": name, "versions": [version], "preferredVersion": version} for name in names]
        }

    def queues(self, namespace: str, local: dict[str, str], cluster: dict[str, dict[str, Any]]) -> None:
        """Serve local queues by name, each with its cluster queue, and specs of cluster queues by name."""
        root = "/apis/kueue.x-k8s.io/v1beta2"
        self.answers[f"{root}/namespaces/{namespace}/localqueues"] = {
            "items": [{"metadata": {"name": name}, "spec": {"clusterQueue": queue}} for name, queue in local.items()]
        }
        self.answers[f"{root}/clusterqueues"] = {
            "items": [{"metadata": {"name": name}, "spec": spec} for name, spec in cluster.items()]
        }

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of one request."""
        if path == REVIEWS:
            asked = json.loads(body)["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, [asked["resource"], asked.get("subresource")]))
            return 201, {"spec": {}, "status": {"allowed": (resource, asked["verb"]) in self.rights}}
        if path not in self.answers:
            return 404, {"message": "not found"}
        found = self.answers[path]
        return (403, {"message": "forbidden"}) if found is None else (200, found)


def flavors(**quotas: dict[str, Any]) -> dict[str, Any]:
    """The spec of a cluster queue with one resource group."""
    return {
        "resourceGroups": [
            {
                "flavors": [
                    {
                        "name": flavor,
                        "resources": [{"name": name, "nominalQuota": value} for name, value in quota.items()],
                    }
                    for flavor, quota in quotas.items()
                ]
            }
        ]
    }


@contextlib.contextmanager
def running_kubernetes(folder: Path) -> Iterator[tuple[FakeKubernetes, Path]]:
    """A server on a free port of the loopback interface, and the kubeconfig that names it."""
    fake = FakeKubernetes()

    with running_json_server(lambda request: fake.answer(request.path, request.body)) as url:
        yield fake, write_kubeconfig(folder, url)
