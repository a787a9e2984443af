"""The definition, the role and the operator on a real API server."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config, dynamic
from kubernetes.client import ApiException

from components.core.store.store import open_store
from infra.chart import render
from pipelines.cli import run_command
from pipelines.records.runs import end_run
from pipelines.retraining.definition import custom_resource_definition
from pipelines.retraining.lease import Lease
from pipelines.retraining.spec import GROUP, KIND, VERSION
from tests.helm.cases import find
from tests.pipelines.conftest import ONLY_DATA
from tests.pipelines.retraining.api_server import running_api_server
from tests.pipelines.run.fake_kfp import FakeKfp, running_kfp
from tests.waiting import PATIENCE_S, wait_until

NAMESPACE = "models"
GIT = {"repository": "platform", "path": "serving/nano.yaml"}
SPEC = {"recipe": {"configMap": "recipe"}, "store": "s3://models/tessera"}


class Api:
    """The API server as an administrator has it."""

    def __init__(self, kubeconfig: Path, operator_kubeconfig: Path) -> None:
        self.kubeconfig, self.operator_kubeconfig = kubeconfig, operator_kubeconfig
        configuration = client.Configuration()
        config.load_kube_config(str(kubeconfig), client_configuration=configuration)
        self.client = client.ApiClient(configuration)
        self.dynamic = dynamic.DynamicClient(self.client)

    def create(self, *bodies: dict[str, Any]) -> None:
        for body in bodies:
            kind = self.dynamic.resources.get(api_version=body["apiVersion"], kind=body["kind"])
            kind.create(body=body, namespace=NAMESPACE if kind.namespaced else None)

    def retraining(self, name: str) -> dict[str, Any]:
        kind = self.dynamic.resources.get(api_version=f"{GROUP}/{VERSION}", kind=KIND)
        found: dict[str, Any] = kind.get(name=name, namespace=NAMESPACE).to_dict()
        return found

    def events(self) -> list[str]:
        found = client.CoreV1Api(self.client).list_namespaced_event(NAMESPACE).items
        return [f"{each.involved_object.name} {each.type} {each.reason}" for each in found]


def retraining(name: str, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": metadata, "spec": SPEC | spec}


def recipe_map(name: str, text: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"recipe.yaml": text}}


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """A server with the namespace, the definition, and the operator's role as the chart makes it."""
    with running_api_server() as (admin, operator):
        found = Api(admin, operator)
        found.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        found.create(custom_resource_definition())
        chart = render({"operator": {"enabled": True}}, namespace=NAMESPACE)
        for kind in ("Role", "RoleBinding"):
            found.create(find(chart, kind, "tessera-operator"))

        def is_served() -> bool:
            with contextlib.suppress(Exception):
                found.dynamic = dynamic.DynamicClient(found.client)
                found.dynamic.resources.get(api_version=f"{GROUP}/{VERSION}", kind=KIND)
                return True
            return False

        wait_until("the definition is served", is_served)
        yield found


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"recipe": {}}, "give the recipe as exactly one of configMap, inline and git"),
        ({"recipe": {"configMap": "a", "inline": {"seed": 1}}}, "exactly one of configMap, inline and git"),
        ({"recipe": {"configMap": "a", "git": GIT}}, "exactly one of configMap, inline and git"),
        ({"recipe": {"git": GIT | {"path": "/etc/passwd"}}}, "spec.recipe.git.path"),
        ({"store": "/tmp/store"}, "spec.store"),
        ({"budget": {"gpuHours": 10, "approveAboveGpuHours": 20}}, "must not be above gpuHours"),
        ({"budget": {"gpuHours": 0}}, "greater than 0"),
        ({"trigger": {"schedule": "weekly"}}, "spec.trigger.schedule"),
        ({"trigger": {"dataset": {"prefix": "s3://b/c", "quiet": "soon"}}}, "spec.trigger.dataset.quiet"),
        ({"history": 0}, "greater than or equal to 1"),
        ({"promote": {"when": ["accuracy_on"]}}, "spec.promote.git: Required value"),
        ({"promote": {"git": GIT, "when": ["luck"]}}, "Unsupported value"),
        ({"promote": {"git": GIT, "when": []}}, "spec.promote.when"),
        ({"promote": {"git": GIT, "against": "parent"}}, "Unsupported value"),
        ({"promote": {"git": GIT, "confidence": 95}}, "spec.promote.confidence"),
        ({"promote": {"git": GIT | {"mode": "force"}}}, "Unsupported value"),
        ({"promote": {"git": GIT | {"path": "../secrets.yaml"}}}, "spec.promote.git.path"),
    ],
    ids=lambda one: json.dumps(one)[:60],
)
def test_the_api_server_refuses_a_wrong_specification(api: Api, spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiException) as refused:
        api.create(retraining("wrong", **spec))
    assert words in str(refused.value.body)


def test_the_api_server_fills_in_the_defaults_and_refuses_a_long_name(api: Api) -> None:
    api.create(retraining("defaults", suspend=True, trigger={}, promote={"git": GIT}))
    assert api.retraining("defaults")["spec"] | {"recipe": None} == {
        **SPEC,
        "recipe": None,
        "suspend": True,
        "history": 10,
        "trigger": {"onChange": True},
        "promote": {
            "against": "champion",
            "confidence": 0.95,
            "tolerance": 0.03,
            "git": {**GIT, "branch": "main", "mode": "pullRequest"},
        },
    }
    with pytest.raises(ApiException) as refused:
        api.create(retraining("n" * 41))
    assert "40 characters at most" in str(refused.value.body)


def test_one_process_has_the_lease_until_it_gives_it_up_or_renews_it_no_more(api: Api) -> None:
    config.load_kube_config(str(api.operator_kubeconfig))
    first, second = Lease(NAMESPACE, "tessera-operator", "first"), Lease(NAMESPACE, "tessera-operator", "second")
    assert (first.hold(), second.hold(), first.hold()) == (True, False, True)
    first.release()
    assert (second.hold(), first.hold()) == (True, False)
    shorter = {"spec": {"leaseDurationSeconds": 1}}
    client.CoordinationV1Api(api.client).patch_namespaced_lease("tessera-operator", NAMESPACE, shorter)
    assert not first.hold()  # it has changed just now
    time.sleep(1.1)
    assert first.hold()
    first.release()


@contextlib.contextmanager
def running_operator(api: Api, kfp: FakeKfp, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "pipelines", "operator", "--namespace", NAMESPACE, "--kfp", kfp.url]
    environment = os.environ | {"KUBECONFIG": str(api.operator_kubeconfig)}
    with log.open("ab") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_change_becomes_a_run_also_when_the_operator_is_killed(
    api: Api, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TESSERA_LOCAL", str(tmp_path / "local"))
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
    log = tmp_path / "operator.log"

    def status(name: str) -> dict[str, Any]:
        return api.retraining(name).get("status") or {}

    with running_kfp() as kfp:
        api.create(recipe_map("recipe", ONLY_DATA), recipe_map("broken", "sft: ["))
        api.create(retraining("broken", store=s3_uri, recipe={"configMap": "broken"}))
        api.create(retraining("nano", store=s3_uri))
        with running_operator(api, kfp, log) as operator:
            run = wait_until(
                "a run", lambda: status("nano").get("attempt", {}).get("kfpRun") and status("nano")["runId"]
            )
            assert wait_until("a condition", lambda: status("broken").get("phase")) == "Invalid"
            operator.send_signal(signal.SIGKILL)
        kfp.runs[0]["state"] = "SUCCEEDED"
        end_run(open_store(s3_uri), run, "succeeded")
        with running_operator(api, kfp, log) as operator:
            wait_until("the end", lambda: status("nano").get("phase") == "Ready")
            assert run_command(["retrain", "nano", "-n", NAMESPACE, "--now"]) == 0
            wait_until("another run", lambda: len(kfp.runs) == 2)
            kfp.runs[0]["state"] = "SUCCEEDED"  # nothing of the object changes
            end_run(open_store(s3_uri), f"{run}-2", "succeeded")
            wait_until("its end", lambda: [each["run"] for each in status("nano")["runs"]] == [f"{run}-2", run])
            assert run_command(["retrain", "nano", "-n", NAMESPACE, "--suspend"]) == 0
            events = wait_until("events", lambda: [e for e in api.events() if e.startswith("nano Normal RunSucceeded")])
            assert events
            operator.terminate()
            assert operator.wait(PATIENCE_S) == 0
            leases = client.CoordinationV1Api(api.client)
            assert not leases.read_namespaced_lease("tessera-operator", NAMESPACE).spec.holder_identity
        assert [each["display_name"] for each in kfp.runs] == [f"{run}-2", run]
    assert api.retraining("nano")["spec"]["suspend"] is True
    metadata = api.retraining("nano")["metadata"]
    assert not metadata.get("finalizers")
    assert list(metadata["annotations"]) == [f"{GROUP}/now"]
    capsys.readouterr()
    assert run_command(["retrain", "nano", "-n", NAMESPACE]) == 0
    shown = capsys.readouterr().out
    assert f"{run}-2" in shown
    assert "Succeeded" in shown
    text = yaml.safe_dump(status("nano"))
    assert "onChange" in text
