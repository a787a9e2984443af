"""Submitting a recipe: one run for the same recipe, followed to its end, refused with a way out."""

import contextlib
import json
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from components.core.base.errors import InputError, RunStopped
from components.core.store.store import open_store
from pipelines.cli import run_command
from pipelines.commands.options import console
from pipelines.recipe.schema import load_recipe
from pipelines.records.runs import artifacts, run_record
from pipelines.run import finish_run, submit
from pipelines.run.kfp_server import KfpRun, KfpServer
from tests.pipelines.run.compiled_pipeline import run_compiled
from tests.pipelines.run.fake_kfp import FakeKfp, running_kfp

TINY = "data.arithmetic={num_train: 60, num_chats: 20, num_validation: 10, num_test: 10}"


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeKfp]:
    monkeypatch.setattr(submit, "POLL_S", 0.05)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TESSERA_LOCAL", str(tmp_path / "laptop"))
    with running_kfp() as fake:
        yield fake


def command(recipe: Path, store: str, kfp: FakeKfp, *options: str) -> list[str]:
    return ["submit", str(recipe), "--store", store, "--kfp", kfp.url, "--set", TINY, *options]


def do_locally(folder: Path, kfp: FakeKfp) -> None:
    """Let runs be done by processes of this machine, each with working copies of its own."""

    def work(pipeline: bytes, parameters: dict[str, str]) -> None:
        (folder / "uploaded.yaml").write_bytes(pipeline)
        run_compiled(folder / "uploaded.yaml", folder / "pods", **parameters)

    kfp.work = work


def test_a_run_is_followed_to_its_end_and_makes_the_same_artifacts_as_a_local_one(
    only_data: Path, s3_uri: str, kfp: FakeKfp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do_locally(tmp_path, kfp)
    assert run_command(command(only_data, s3_uri, kfp, "--watch")) == 0
    shown = capsys.readouterr().out
    (run,) = kfp.runs
    name = run["display_name"]
    assert f"run {name} is submitted" in shown
    assert "data: done" in shown
    assert "report" in shown

    store = open_store(s3_uri)
    assert run_record(store, name)["status"] == "succeeded"
    assert "<html" in (store.text(f"runs/{name}/report.html") or "")
    assert run_command(["run", str(only_data), "--store", str(tmp_path / "local"), "--set", TINY]) == 0
    assert artifacts(store, name) == artifacts(open_store(tmp_path / "local"), "only-data-1")
    assert list((tmp_path / "pods").rglob("mlflow.db")) == []  # a database of a pod would be lost with it

    assert run_command(command(only_data, s3_uri, kfp, "--watch")) == 0
    assert "has succeeded already" in capsys.readouterr().out
    assert len(kfp.runs) == 1


def test_mlflow_has_one_run_and_a_nested_one_for_each_stage(
    only_data: Path, s3_uri: str, kfp: FakeKfp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    do_locally(tmp_path, kfp)
    assert run_command(command(only_data, s3_uri, kfp, "--watch")) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        runs = {
            name: (run, status) for run, name, status in database.execute("SELECT run_uuid, name, status FROM runs")
        }
        parents = dict(database.execute("SELECT run_uuid, value FROM tags WHERE key = 'mlflow.parentRunId'"))
    name = kfp.runs[0]["display_name"]
    assert {each: status for each, (_, status) in runs.items()} == {name: "FINISHED", "data": "FINISHED"}
    assert parents == {runs["data"][0]: runs[name][0]}


def test_the_pages_of_a_run_have_numbers_models_addresses_and_the_report(
    only_data: Path, s3_uri: str, kfp: FakeKfp, tmp_path: Path
) -> None:
    do_locally(tmp_path, kfp)
    assert run_command(command(only_data, s3_uri, kfp, "--watch")) == 0
    (stage,) = (tmp_path / "pods").glob("*/data")
    (shown,) = json.loads((stage / "executor_output.json").read_text())["artifacts"]["stage_metrics"]["artifacts"]
    assert shown["type"]["schemaTitle"] == "system.Metrics"
    assert all(isinstance(value, int | float) for value in shown["metadata"].values())
    assert "seconds" in shown["metadata"]
    assert (stage / "stage_summary").read_text().startswith("# data\n")
    assert "<html" in (tmp_path / "pods" / "finish" / "report").read_text()


def test_a_stage_that_refuses_its_data_is_named_and_the_run_is_recorded_as_failed(
    only_data: Path, s3_uri: str, kfp: FakeKfp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nno json\n')
    do_locally(tmp_path, kfp)
    options = ("--watch", "--set", f"corpus={tmp_path / 'bad.jsonl'}")
    assert run_command(command(only_data, s3_uri, kfp, *options)) == 2
    error = capsys.readouterr().err
    assert "stage data: " in error
    assert f"log: {kfp.url}/#/runs/details/" in error
    name = kfp.runs[0]["display_name"]
    assert run_record(open_store(s3_uri), name)["status"] == "failed"

    assert run_command(command(only_data, s3_uri, kfp, *options)) == 2  # the same again is another attempt
    assert [run["display_name"] for run in kfp.runs] == [name, name]


def test_the_same_recipe_is_one_run_and_one_version_of_its_pipeline(
    only_data: Path, s3_uri: str, kfp: FakeKfp, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(command(only_data, s3_uri, kfp)) == 0
    assert run_command(command(only_data, s3_uri, kfp)) == 0
    assert "is there already, and goes on" in capsys.readouterr().out
    options = ("--set", "seed=9", "--service-account", "tessera-pipelines")
    assert run_command(command(only_data, s3_uri, kfp, *options)) == 0
    assert [run.get("service_account") for run in kfp.runs] == ["tessera-pipelines", None]
    (pipeline,) = kfp.kinds["pipelines"]
    assert pipeline["display_name"] == "only-data"
    (first, second) = {run["display_name"] for run in kfp.runs}
    assert first != second
    for run in kfp.runs:
        assert run["runtime_config"]["parameters"] == {"store": s3_uri, "run": run["display_name"]}
        assert run_record(open_store(s3_uri), run["display_name"])["status"] == "running"

    kfp.runs[0]["state"] = "FAILED"  # a further attempt is a run of the version that is there
    assert run_command(command(only_data, s3_uri, kfp, "--set", "seed=9")) == 0
    names = [version["display_name"] for version in kfp.kinds["pipeline_versions"]]
    assert len(kfp.runs) == 3
    assert len(names) == len(set(names))
    uploaded = list(yaml.safe_load_all(next(iter(kfp.uploads.values()))))
    assert uploaded[1]["platforms"].keys() == {"kubernetes"}


def test_a_run_is_cancelled_and_then_there_is_none_to_cancel(
    only_data: Path, s3_uri: str, kfp: FakeKfp, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(command(only_data, s3_uri, kfp)) == 0
    assert run_command(command(only_data, s3_uri, kfp, "--cancel")) == 0
    (run,) = kfp.runs
    assert KfpServer(kfp.url, "kubeflow").run(run["run_id"]).state == "CANCELED"
    assert run_record(open_store(s3_uri), run["display_name"])["status"] == "interrupted"
    assert run_command(command(only_data, s3_uri, kfp, "--cancel")) == 2
    assert "it is CANCELED" in capsys.readouterr().err


@pytest.mark.parametrize("task_comes_first", [True, False])
def test_a_cancelled_run_stays_cancelled_although_its_last_task_finds_stages_missing(
    only_data: Path, s3_uri: str, kfp: FakeKfp, tmp_path: Path, *, task_comes_first: bool
) -> None:
    assert run_command(command(only_data, s3_uri, kfp)) == 0
    name = kfp.runs[0]["display_name"]
    executor_input = json.dumps({"outputs": {"outputFile": str(tmp_path / "output.json")}})
    last_task = ["--store", s3_uri, "--run", name, "--labels", '["data"]', "--executor-input", executor_input]
    if task_comes_first:
        assert finish_run.main(last_task) == 0
        assert run_record(open_store(s3_uri), name)["status"] == "failed"
    assert run_command(command(only_data, s3_uri, kfp, "--cancel")) == 0
    if not task_comes_first:
        assert finish_run.main(last_task) == 0
    assert run_record(open_store(s3_uri), name)["status"] == "interrupted"


def test_a_watcher_hears_that_another_command_cancelled_the_run_although_kfp_says_that_it_failed(
    only_data: Path, s3_uri: str, kfp: FakeKfp
) -> None:
    submitter = submit.Submitter(s3_uri, KfpServer(kfp.url, "kubeflow"), "kubeflow", queues=False, console=console())
    submitted = submitter.submit(load_recipe(only_data, [TINY]), None)
    submitter.cancel(submitted)
    del kfp.runs[0]["state_history"]  # a KFP that did not come to report the state between
    with pytest.raises(RunStopped, match="was cancelled"):
        submitter.watch(submitted)


def test_only_a_server_with_tenants_is_given_a_namespace(only_data: Path, s3_uri: str, kfp: FakeKfp) -> None:
    assert run_command(command(only_data, s3_uri, kfp, "--namespace", "team")) == 0
    assert not kfp.kinds["experiments"][0].get("namespace")
    kfp.multi_user = True
    kfp.kinds["experiments"].clear()
    assert run_command(command(only_data, s3_uri, kfp, "--namespace", "team", "--run", "other")) == 0
    assert kfp.kinds["experiments"][0]["namespace"] == "team"


def test_ctrl_c_leaves_the_run_and_says_how_to_go_on(only_data: Path, s3_uri: str, kfp: FakeKfp) -> None:
    class Interrupted(KfpServer):
        def run(self, run_id: str) -> KfpRun:
            raise KeyboardInterrupt

    server = Interrupted(kfp.url, "kubeflow")
    submitter = submit.Submitter(s3_uri, server, "kubeflow", queues=False, console=console())
    submitted = submitter.submit(load_recipe(only_data, [TINY]), None)
    with pytest.raises(RunStopped, match="goes on without this command") as caught:
        submitter.watch(submitted)
    assert caught.value.hint is not None
    assert "--cancel" in caught.value.hint
    assert kfp.runs[0]["state"] == "RUNNING"
    assert run_record(open_store(s3_uri), submitted.name)["status"] == "running"


def test_what_cannot_be_submitted_is_refused_with_a_way_out(
    only_data: Path, s3_uri: str, kfp: FakeKfp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(command(only_data, str(tmp_path / "folder"), kfp)) == 2
    assert "--store s3://bucket/prefix" in capsys.readouterr().err
    kfp.refuse = 403
    assert run_command(command(only_data, s3_uri, kfp)) == 2
    assert "refuses you: User 'ann' is not authorized" in capsys.readouterr().err
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        kfp.url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert run_command(command(only_data, s3_uri, kfp)) == 2
    error = capsys.readouterr().err
    assert f"does not answer at {kfp.url}" in error
    assert "--kfp URL" in error
    assert not open_store(s3_uri).documents("runs/")


def test_a_name_belongs_to_one_recipe(only_data: Path, s3_uri: str, kfp: FakeKfp) -> None:
    assert run_command(command(only_data, s3_uri, kfp, "--run", "mine")) == 0
    submitter = submit.Submitter(s3_uri, KfpServer(kfp.url, "kubeflow"), "kubeflow", queues=False, console=console())
    for state in ("RUNNING", "FAILED"):
        kfp.runs[0]["state"] = state
        with pytest.raises(InputError, match="run 'mine' of another recipe"):
            submitter.submit(load_recipe(only_data, [TINY, "seed=5"]), "mine")
    assert len(kfp.runs) == 1
