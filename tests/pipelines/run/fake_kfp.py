"""Stands in for a real Kubeflow Pipelines server: the v2beta1 calls that `kfp.Client` makes for us, state in memory.

A run is done by a function of the test, in a thread; nothing of KFP's scheduler, driver or launcher is tested with it.
"""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tests.json_server import Request, running_json_server

Work = Callable[[bytes, dict[str, str]], None]
"""Does a run: takes the uploaded pipeline and the parameters, raises to fail."""


def never_ends(pipeline: bytes, parameters: dict[str, str]) -> None:
    """A run whose pods wait."""
    threading.Event().wait()


class FakeKfp:
    """The state of the server.

    Attributes:
        work: does the runs that are started from now on.
        multi_user: whether it has tenants.
        refuse: status of all answers but health's, if set.
        uploads: uploaded pipelines, bytes by the id of their version.
    """

    def __init__(self) -> None:
        self.work: Work = never_ends
        self.refuse: int | None = None
        self.multi_user = False
        self.uploads: dict[str, bytes] = {}
        self.kinds: dict[str, list[dict[str, Any]]] = {
            kind: [] for kind in ("experiments", "pipelines", "pipeline_versions", "runs")
        }
        self.url = ""

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.kinds["runs"]

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, content: str) -> Any:
        """The answer to one request; LookupError for what is not there."""
        path = path.removeprefix("/apis/v2beta1/")
        if path == "healthz":
            return {"multi_user": self.multi_user}
        if path == "pipelines/upload_version":
            return self._upload(query, body, content)
        if path == "pipelines" and method == "POST":
            return self._add("pipelines", "pipeline_id", json.loads(body))
        if found := re.fullmatch(r"pipelines/([^/]+)/versions", path):
            return self._list("pipeline_versions", query, pipeline_id=found[1])
        if found := re.fullmatch(r"runs/([^/:]+)(:terminate)?", path):
            run = next(run for run in self.runs if run["run_id"] == found[1])
            if found[2]:
                run["state"] = "FAILED"  # as a KFP does, whose Workflow fails
                run["state_history"] = [{"state": state} for state in ("RUNNING", "CANCELING", "FAILED")]
                return {}
            return run
        if path == "runs" and method == "POST":
            return self._start(json.loads(body))
        if path == "experiments" and method == "POST":
            return self._add("experiments", "experiment_id", json.loads(body))
        return self._list(path, query)

    def _add(self, kind: str, key: str, values: dict[str, Any]) -> dict[str, Any]:
        made = {**values, key: f"{kind}-{len(self.kinds[kind])}", "created_at": "2026-01-01T00:00:00Z"}
        self.kinds[kind].insert(0, made)  # newest first
        return made

    def _list(self, kind: str, query: dict[str, str], **fields: str) -> dict[str, Any]:
        predicates = json.loads(query.get("filter", "{}")).get("predicates", [])
        assert all(each["operation"] == 1 for each in predicates)
        fields |= {each["key"]: each["stringValue"] for each in predicates}
        found = [each for each in self.kinds[kind] if fields.items() <= each.items()]
        return {kind: found, "total_size": len(found)}

    def _upload(self, query: dict[str, str], body: bytes, content: str) -> dict[str, Any]:
        boundary = content.partition("boundary=")[2].encode()
        data = body.split(b"--" + boundary)[1].partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        values = {"display_name": query["name"], "pipeline_id": query["pipelineid"]}
        version = self._add("pipeline_versions", "pipeline_version_id", values)
        self.uploads[version["pipeline_version_id"]] = data
        return version

    def _start(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = self._add("runs", "run_id", {**asked, "state": "RUNNING"})
        pipeline = self.uploads[asked["pipeline_version_reference"]["pipeline_version_id"]]

        def work() -> None:
            try:
                self.work(pipeline, asked["runtime_config"]["parameters"])
            except Exception as error:
                run["error"] = {"code": 13, "message": f"task failed: {type(error).__name__}"}
                run["state"] = "FAILED"
            else:
                run["state"] = "SUCCEEDED"

        threading.Thread(target=work, daemon=True).start()
        return run


@contextlib.contextmanager
def running_kfp() -> Iterator[FakeKfp]:
    """A server on a free port of the loopback interface."""
    fake = FakeKfp()

    def answer(request: Request) -> tuple[int, Any]:
        if fake.refuse is not None and not request.path.endswith("healthz"):
            return fake.refuse, {"message": "User 'ann' is not authorized"}
        try:
            return 200, fake.answer(request.method, request.path, request.query, request.body, request.content_type)
        except (LookupError, StopIteration) as error:
            return 404, {"message": f"not found: {error!r}"}

    with running_json_server(answer) as fake.url:
        yield fake
