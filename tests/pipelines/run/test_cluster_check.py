"""What a cluster lacks, against a server that answers as a real one does."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import run_command
from pipelines.run.cluster_check import API_GROUPS, RETRY_DEFAULTS, RIGHTS
from tests.pipelines.run.fake_kfp import FakeKfp, running_kfp
from tests.pipelines.run.fake_kubernetes import FakeKubernetes, flavors, running_kubernetes

CORE = "/api/v1/namespaces/team"
SECRET, SETTINGS = f"{CORE}/secrets/tessera-store", f"{CORE}/configmaps/tessera-settings"
ARGO = "/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeKubernetes, FakeKfp]]:
    """A cluster that lacks nothing."""
    with running_kubernetes(tmp_path) as (fake, path), running_kfp() as kfp:
        monkeypatch.setenv("KUBECONFIG", str(path))
        fake.groups(*API_GROUPS)
        quota = {"cpu": 8, "memory": "64Gi"}
        fake.queues(
            "team",
            {"gpu": "gpu", "cpu": "cpu"},
            {"gpu": flavors(h100=quota | {"nvidia.com/gpu": 8}), "cpu": flavors(plain=quota)},
        )
        fake.answers["/version/"] = dict.fromkeys(
            ("buildDate", "compiler", "gitCommit", "gitTreeState", "goVersion", "platform"), "x"
        ) | {"major": "1", "minor": "36", "gitVersion": "v1.36.3"}
        fake.answers[f"{CORE}/serviceaccounts/tessera-pipelines"] = {"metadata": {"name": "tessera-pipelines"}}
        fake.answers[SETTINGS] = {"data": {"MLFLOW_TRACKING_URI": "http://m", "AWS_ENDPOINT_URL": "http://s"}}
        fake.answers[SECRET] = {"data": {"AWS_ACCESS_KEY_ID": "YQ==", "AWS_SECRET_ACCESS_KEY": "YQ=="}}
        fake.answers[ARGO] = {"data": {"workflowDefaults": yaml.safe_dump(RETRY_DEFAULTS)}}
        fake.rights = {(resource, verb) for _, resource, verb in RIGHTS}
        yield fake, kfp


def checked(kfp: FakeKfp, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code of the command, and its lines by name."""
    status = run_command(["cluster", "check", "--namespace", "team", "--kfp", kfp.url, "--json"])
    return status, {line["name"]: line for line in json.loads(capsys.readouterr().out)}


def test_a_cluster_with_everything_passes(
    cluster: tuple[FakeKubernetes, FakeKfp], capsys: pytest.CaptureFixture[str]
) -> None:
    _, kfp = cluster
    status, lines = checked(kfp, capsys)
    assert {name: line["found"] for name, line in lines.items() if line["passed"] is not True} == {}
    assert status == 0
    assert lines["Kubernetes"]["found"] == "v1.36.3"
    assert lines["node pool gpu"]["found"] == "h100 cpu 8, memory 64 GiB, nvidia.com/gpu 8"
    assert run_command(["cluster", "check", "--namespace", "team", "--kfp", kfp.url]) == 0
    assert f"answers at {kfp.url}" in capsys.readouterr().out


def test_everything_that_is_missing_has_a_remedy(
    cluster: tuple[FakeKubernetes, FakeKfp], capsys: pytest.CaptureFixture[str]
) -> None:
    fake, kfp = cluster
    fake.groups("argoproj.io", "kueue.x-k8s.io")
    fake.answers["/version/"]["minor"] = "33+"
    fake.queues("team", {"gpu": "gpu"}, {"gpu": flavors(plain={"cpu": 8})})
    del fake.answers[SETTINGS]
    fake.answers[ARGO] = {"data": {"workflowDefaults": "spec: {serviceAccountName: other}"}}
    fake.rights.clear()
    status, lines = checked(kfp, capsys)
    failed = {name for name, line in lines.items() if line["passed"] is False}
    assert status == 1
    assert failed == {
        "Kubernetes",
        "JobSet",
        "Kubeflow Trainer",
        "retries of evicted pods",
        "node pool cpu",
        "node pool gpu",
        "config map tessera-settings",
        *(f"right to {verb} {resource}" for _, resource, verb in RIGHTS),
    }
    assert all(lines[name]["remedy"] for name in failed)


def test_a_workload_identity_stands_in_for_the_keys_of_the_store(
    cluster: tuple[FakeKubernetes, FakeKfp], capsys: pytest.CaptureFixture[str]
) -> None:
    fake, kfp = cluster
    del fake.answers[SECRET]
    status, lines = checked(kfp, capsys)
    assert status == 0
    assert lines["secret tessera-store"]["passed"] is None
    fake.answers[SECRET] = {"data": {"AWS_ACCESS_KEY_ID": "a2V5"}}
    status, lines = checked(kfp, capsys)
    assert status == 1
    assert "AWS_SECRET_ACCESS_KEY" in lines["secret tessera-store"]["found"]


def test_what_you_may_not_read_is_not_called_missing(
    cluster: tuple[FakeKubernetes, FakeKfp], capsys: pytest.CaptureFixture[str]
) -> None:
    fake, kfp = cluster
    fake.answers[SECRET] = fake.answers[ARGO] = None
    status, lines = checked(kfp, capsys)
    assert (status, lines["secret tessera-store"]["passed"]) == (0, None)
    assert lines["retries of evicted pods"]["passed"] is None


def test_without_a_cluster_the_way_to_name_one_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    assert run_command(["cluster", "check"]) == 2
    assert "set KUBECONFIG" in capsys.readouterr().err
