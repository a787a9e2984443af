"""Stands in for an API server with Kubeflow Trainer: the `TrainJob`s of a namespace, and the pods that a test gives."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.json_server import Request, running_json_server, write_kubeconfig

NAMESPACE = "runs"
JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
Object = dict[str, Any]


class FakeTrainer:
    """Keeps objects; a test says what happens at a read.

    Attributes:
        jobs: the `TrainJob`s by name.
        pods: all pods.
        requests: method and path of each request.
        on_read: called with a `TrainJob` at each read of it.
        refusals: answers to the next requests instead of what they ask for.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, Object] = {}
        self.pods: list[Object] = []
        self.requests: list[tuple[str, str]] = []
        self.on_read: Callable[[Object], None] = lambda job: None
        self.refusals: list[tuple[int, Object]] = []

    def made(self, method: str) -> int:
        """How many requests for `TrainJob`s had a method."""
        return sum(each == method and path.startswith(JOBS) for each, path in self.requests)

    def answer(self, request: Request) -> tuple[int, Any]:
        """Status and JSON of one request."""
        self.requests.append((request.method, request.path))
        if self.refusals:
            return self.refusals.pop(0)
        if request.path == PODS:
            return 200, {"kind": "PodList", "items": self.pods}
        if request.path.startswith(PODS):
            return 200, f"log of {request.path.split('/')[-2]}"
        name = request.path.removeprefix(JOBS).strip("/")
        if request.method == "POST":
            body = json.loads(request.body)
            self.jobs[body["metadata"]["name"]] = body
            return 201, body
        if name not in self.jobs:
            return 404, {"message": "not found"}
        if request.method == "DELETE":
            return 200, self.jobs.pop(name)
        if request.method == "PATCH":
            self.jobs[name]["metadata"] |= json.loads(request.body)["metadata"]
        else:
            self.on_read(self.jobs[name])
        return 200, self.jobs[name]


def end(job: Object, kind: str, message: str = "") -> None:
    """Give a `TrainJob` the condition that Trainer gives it at its end."""
    job["status"] = {"conditions": [{"type": kind, "status": "True", "message": message}]}


def pod(node: int, *, exit_code: int | None = None, message: str = "", reason: str = "Error", at: int = 0) -> Object:
    """A pod of a node: it runs, or has ended."""
    running = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    ended = {"exitCode": exit_code, "message": message, "reason": reason, "finishedAt": f"2026-01-01T00:00:{at:02}Z"}
    status: Object = {"name": "node", "state": running if exit_code is None else {"terminated": ended}}
    status |= {"image": "i", "imageID": "i", "ready": False, "restartCount": 0}
    labels = {"batch.kubernetes.io/job-completion-index": str(node)}
    metadata = {"name": f"pod-{node}", "uid": f"uid-{node}", "labels": labels}
    return {"metadata": metadata, "status": {"containerStatuses": [status]}}


@contextlib.contextmanager
def running_trainer(folder: Path) -> Iterator[tuple[FakeTrainer, Path]]:
    """A server on a free port of the loopback interface, and the kubeconfig that names it."""
    fake = FakeTrainer()
    with running_json_server(fake.answer) as url:
        yield fake, write_kubeconfig(folder, url)
