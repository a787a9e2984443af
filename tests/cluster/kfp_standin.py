"""Stands in for the backend of Kubeflow Pipelines on a cluster with Argo: answers `kfp.Client`, and starts Workflows.

It keeps pipelines and runs in memory; a run's state is that of its Workflow. It has no cache, no artifacts and no
tenants. Nothing of KFP's own scheduler, driver or launcher is tested with it.
"""

import contextlib
import datetime
import json
import threading
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

import yaml

from tests.cluster.argo_workflow import PodAdditions, Unsupported, Values, workflow
from tests.json_server import LOOPBACK, Request, running_json_server

PREFIX = "/apis/v2beta1/"
RUN_LABEL = "pipeline/runid"
PHASES = {
    "": "PENDING",
    "Pending": "PENDING",
    "Running": "RUNNING",
    "Succeeded": "SUCCEEDED",
    "Failed": "FAILED",
    "Error": "FAILED",
    "Skipped": "SKIPPED",
    "Omitted": "SKIPPED",
}
"""KFP's state by Argo's phase."""
IDS = {
    "pipelines": "pipeline_id",
    "pipeline_versions": "pipeline_version_id",
    "experiments": "experiment_id",
    "runs": "run_id",
}


class Workflows(Protocol):
    """Argo, as far as the stand-in uses it."""

    def create(self, workflow: Values) -> str:
        """Create a Workflow; returns its name."""

    def get(self, name: str) -> Values | None:
        """A Workflow, None where it is gone."""

    def terminate(self, name: str) -> None:
        """End a Workflow's pods."""


class Refused(Exception):
    """An answer with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class KfpStandIn:
    """Pipelines, experiments and runs."""

    def __init__(self, workflows: Workflows, additions: PodAdditions) -> None:
        self.url = ""
        self._workflows, self._additions = workflows, additions
        self._stored: dict[str, list[Values]] = {kind: [] for kind in IDS}
        self._documents: dict[str, list[Values]] = {}
        self._workflow_names: dict[str, str] = {}
        self._stopped: set[str] = set()
        self._lock = threading.RLock()

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> Values:
        """The answer to one request.

        Raises:
            Refused: what is asked for does not exist, or is not known.
        """
        with self._lock:
            match [method, *path.removeprefix(PREFIX).strip("/").split("/")]:
                case ["GET", "healthz"]:
                    return {"multi_user": False, "tag_name": "stand-in"}
                case ["POST", "pipelines", "upload"]:
                    pipeline = self._add("pipelines", {"display_name": query["name"], "name": query["name"]})
                    self._upload(body, pipeline["pipeline_id"], query["name"])
                    return pipeline
                case ["POST", "pipelines", "upload_version"]:
                    return self._upload(body, query["pipelineid"], query["name"])
                case ["POST", "pipelines" | "experiments" as kind]:
                    return self._add_named(kind, json.loads(body))
                case ["POST", "runs"]:
                    return self._start(json.loads(body))
                case ["POST", "runs", action] if action.endswith(":terminate"):
                    return self._terminate(action.removesuffix(":terminate"))
                case ["GET", "pipelines" | "experiments" | "runs" as kind]:
                    return self._list(kind, query)
                case ["GET", "pipelines" | "experiments" | "runs" as kind, key]:
                    return self._view(kind, self._find(kind, key))
                case ["GET", "pipelines", key, "versions"]:
                    return self._list("pipeline_versions", query, pipeline_id=key)
                case ["GET", "pipelines", _, "versions", key]:
                    return self._find("pipeline_versions", key)
        raise Refused(501, f"the stand-in does not know {method} {path}")

    def workflow_name(self, run_id: str) -> str:
        """The Workflow of a run."""
        return self._workflow_names[run_id]

    def _add(self, kind: str, values: Values) -> Values:
        created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        made = {**values, IDS[kind]: str(uuid.uuid4()), "created_at": created}
        self._stored[kind].insert(0, made)
        return made

    def _add_named(self, kind: str, values: Values) -> Values:
        """The thing of a name; it is made where it is not there."""
        same = (each for each in self._stored[kind] if each["display_name"] == values["display_name"])
        return next(same, None) or self._add(kind, values)

    def _find(self, kind: str, key: str) -> Values:
        found = next((each for each in self._stored[kind] if each[IDS[kind]] == key), None)
        if found is None:
            raise Refused(404, f"{kind}: {key} is not found")
        return found

    def _list(self, kind: str, query: dict[str, str], **fields: str) -> Values:
        """What has the fields, the newest first, on one page."""
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            if str(predicate["operation"]) not in {"1", "EQUALS"}:
                raise Refused(501, f"the stand-in does not know the filter {predicate}")
            key = "display_name" if predicate["key"] == "name" else predicate["key"]
            fields[key] = predicate.get("stringValue", predicate.get("string_value"))
        fields |= {key: query[key] for key in ("experiment_id",) if query.get(key)}
        found = [each for each in self._stored[kind] if fields.items() <= each.items()]
        return {kind: [self._view(kind, each) for each in found], "total_size": len(found)}

    def _upload(self, body: bytes, pipeline_id: str, name: str) -> Values:
        """A new version of a pipeline, from the one file of a form."""
        boundary = body.partition(b"\r\n")[0]
        text = body.split(boundary)[1].partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        documents = [each for each in yaml.safe_load_all(text) if each]
        version = self._add("pipeline_versions", {"display_name": name, "pipeline_id": pipeline_id})
        self._documents[version["pipeline_version_id"]] = documents
        return version

    def _start(self, asked: Values) -> Values:
        version = asked.get("pipeline_version_reference", {}).get("pipeline_version_id")
        documents = self._documents.get(str(version))
        if documents is None:
            raise Refused(404, f"the pipeline version {version} is not found")
        parameters = asked.get("runtime_config", {}).get("parameters", {})
        run = {key: asked[key] for key in ("display_name", "experiment_id", "runtime_config") if key in asked}
        made = self._add("runs", run | {"pipeline_version_reference": asked.get("pipeline_version_reference")})
        platform = documents[1] if len(documents) > 1 else {}
        try:
            created = workflow(documents[0], platform, parameters, self._additions, {RUN_LABEL: made["run_id"]})
        except Unsupported as error:
            self._stored["runs"].remove(made)
            raise Refused(400, f"the stand-in does not know {error}") from error
        if account := asked.get("service_account"):
            created["spec"]["serviceAccountName"] = account
        self._workflow_names[made["run_id"]] = self._workflows.create(created)
        return self._view("runs", made)

    def _terminate(self, run_id: str) -> Values:
        self._find("runs", run_id)
        self._stopped.add(run_id)
        self._workflows.terminate(self._workflow_names[run_id])
        return {}

    def _view(self, kind: str, stored: Values) -> Values:
        """What the API shows: of a run, also the state of its Workflow."""
        if kind != "runs":
            return stored
        found = self._workflows.get(self._workflow_names[stored["run_id"]])
        status = (found or {"status": {"phase": "Error", "message": "the Workflow is gone"}}).get("status", {})
        state = PHASES[status.get("phase", "")]
        if stored["run_id"] in self._stopped and state != "SUCCEEDED":
            state = "CANCELED" if state == "FAILED" else "CANCELING"
        tasks = [
            {"task_id": key, "run_id": stored["run_id"], **_task_view(node)}
            for key, node in status.get("nodes", {}).items()
            if node["type"] in {"Pod", "DAG", "Skipped"}
        ]
        seen = stored | {"state": state, "run_details": {"task_details": tasks}}
        if finished := status.get("finishedAt"):
            seen["finished_at"] = finished
        if state == "FAILED":
            seen["error"] = {"code": 13, "message": status.get("message", "")}
        return seen


def _task_view(node: Values) -> Values:
    view = {"display_name": node["displayName"], "state": PHASES[node.get("phase", "")]}
    view |= {key: node[own] for key, own in (("start_time", "startedAt"), ("end_time", "finishedAt")) if node.get(own)}
    if view["state"] == "FAILED" and node.get("message"):
        view["error"] = {"code": 13, "message": node["message"]}
    return view


@contextlib.contextmanager
def running_standin(workflows: Workflows, additions: PodAdditions, host: str = LOOPBACK) -> Iterator[KfpStandIn]:
    """The stand-in on a free port."""
    standin = KfpStandIn(workflows, additions)

    def answer(request: Request) -> tuple[int, Any]:
        try:
            return 200, standin.answer(request.method, request.path, request.query, request.body)
        except Refused as error:
            return error.status, {"error": str(error), "code": error.status, "message": str(error)}

    with running_json_server(answer, host) as standin.url:
        yield standin
