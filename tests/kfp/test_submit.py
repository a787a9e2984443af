"""`tessera submit` on a Kubeflow Pipelines with its own scheduler, drivers and launchers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from components.core.base.flat_values import numbers
from components.core.runtime.event_mirror import fetch_events
from components.core.runtime.events import EventFile
from components.core.runtime.runner import events_path
from components.core.store.store import StageRecord, Store, open_store
from pipelines.recipe.pod_settings import RUN_LABEL, STAGE_LABEL
from pipelines.records.runs import artifacts, run_names, run_record, stage_documents
from pipelines.run.kfp_server import KfpServer
from tests.cluster.api import Cluster
from tests.kfp.ml_metadata import Artifact, MlMetadata
from tests.kfp.submit_command import SubmitCommand, tessera
from tests.small_recipe import RECIPE, only_run, write_recipe

pytestmark = pytest.mark.kfp

STAGES = ("data", "parent", "sft")
SESSION = "store_session_info"
"""KFP's own entry in the metadata of every artifact."""
ONLY_DATA: dict[str, Any] = {"parent_pretrain": None, "sft": None}
PATIENCE_S = 300.0
"""Longest wait for pods to start."""
LONG = {**RECIPE["parent_pretrain"], "num_steps": 3000}
"""Trains long enough to be ended on the way."""


class Finished(NamedTuple):
    """A recipe that ran to its end."""

    submit: SubmitCommand
    name: str
    id: str
    shown: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[], str], server: KfpServer) -> Finished:
    submit = SubmitCommand(write_recipe(tmp_path_factory.mktemp("recipe"), "kfp-test"), new_store())
    done = submit("--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    name = only_run(submit.store)
    found = server.find_run(name)
    assert found is not None
    assert found.state == "SUCCEEDED"
    return Finished(submit, name, found.id, done.stdout)


def test_the_watcher_sees_each_stage_and_the_report(finished: Finished) -> None:
    assert f"run {finished.name} is submitted" in finished.shown
    for stage in STAGES:
        assert f"{stage}: done" in finished.shown
    store = open_store(finished.submit.store)
    assert run_record(store, finished.name)["status"] == "succeeded"
    assert "<html" in (store.text(f"runs/{finished.name}/report.html") or "")


def test_the_digests_are_those_of_a_local_run(finished: Finished, tmp_path: Path) -> None:
    local = str(tmp_path / "local")
    assert tessera("run", str(finished.submit.recipe), "--store", local).returncode == 0
    made = artifacts(open_store(finished.submit.store), finished.name)
    assert len(made) >= len(STAGES)
    assert made == artifacts(open_store(local), only_run(local))


def test_the_same_recipe_again_finds_the_run(finished: Finished, client: Any, server: KfpServer) -> None:
    again = finished.submit("--watch")
    assert again.returncode == 0, again.stderr
    assert "has succeeded already" in again.stdout
    assert len(runs_of(client, server, finished.name)) == 1


def test_the_interface_has_numbers_pages_models_and_the_report(finished: Finished, metadata: MlMetadata) -> None:
    found = metadata.artifacts(finished.id)
    assert {"stage_metrics", "stage_summary", "report"} <= {each.name for each in found}
    metrics = named(found, "stage_metrics")
    assert len(metrics) == len(STAGES)
    assert {each.type for each in metrics} == {"system.Metrics"}
    for record in stage_results(open_store(finished.submit.store), finished.name):
        result = {name: value for name, value in numbers(record.result).items() if math.isfinite(value)}
        wanted = pytest.approx({"seconds": record.seconds, **result}, abs=1e-6)  # the launcher writes six digits
        assert any(
            {name: value for name, value in each.metadata.items() if name != SESSION} == wanted for each in metrics
        )
    assert {each.type for each in named(found, "stage_summary")} == {"system.Markdown"}
    (report,) = named(found, "report")
    assert report.type == "system.HTML"
    assert report.metadata["address"] == f"{finished.submit.store}/runs/{finished.name}/report.html"
    models = [each for each in found if each.type == "system.Model"]
    made = artifacts(open_store(finished.submit.store), finished.name)
    assert {each.metadata["digest"] for each in models} <= set(made.values())
    assert len(models) == 2


def test_a_finished_stage_comes_from_our_store_and_not_from_kfps_cache(
    finished: Finished, client: Any, server: KfpServer
) -> None:
    again = finished.submit("--watch", "--run", f"{finished.name}-again")
    assert again.returncode == 0, again.stderr
    for stage in STAGES:
        assert f"{stage}: cached" in again.stdout
    (run,) = runs_of(client, server, f"{finished.name}-again")
    tasks = client.get_run(run.run_id).run_details.task_details
    executors = [task.state for task in tasks if task.display_name.partition("(")[0] == "executor"]
    assert executors.count("SUCCEEDED") > len(STAGES)
    assert set(executors) == {"SUCCEEDED"}  # a task that KFP takes from its cache has its executor skipped


def test_a_stage_that_fails_is_not_computed_again_and_its_error_is_what_the_user_reads(
    tmp_path: Path, new_store: Callable[[], str], client: Any, server: KfpServer
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nno json\n')
    recipe = write_recipe(tmp_path, "kfp-test-fails", **ONLY_DATA, corpus=str(tmp_path / "bad.jsonl"))
    submit = SubmitCommand(recipe, new_store())
    for attempt in (1, 2):  # the second finds what the first uploaded
        done = submit("--watch")
        assert done.returncode == 2, done.stdout + done.stderr
        assert "stage data: " in done.stderr
        assert "line 2" in done.stderr
        assert server.page("") in done.stderr
        name = only_run(submit.store)
        store = open_store(submit.store)
        assert run_record(store, name)["status"] == "failed"
        assert starts(store, name, "data") == attempt
        runs = runs_of(client, server, name)
        assert [run.state for run in runs] == ["FAILED"] * attempt
    (pipeline,) = client.list_pipelines(filter=equals("kfp-test-fails"), namespace=server.namespace).pipelines
    versions = client.list_pipeline_versions(pipeline.pipeline_id, page_size=100).pipeline_versions
    names = [version.display_name for version in versions]
    assert len(names) == len(set(names))
    assert len({run.pipeline_version_reference.pipeline_version_id for run in runs}) == 1


def test_a_stage_whose_pod_is_ended_is_tried_again(tmp_path: Path, new_store: Callable[[], str], pods: Cluster) -> None:
    recipe = write_recipe(tmp_path, "kfp-test-ended", parent_pretrain=LONG, sft=None)
    submit = SubmitCommand(recipe, new_store())
    assert submit().returncode == 0
    name, store = only_run(submit.store), open_store(submit.store)
    pods.wait("the stage works", lambda: starts(store, name, "parent"), PATIENCE_S)
    (pod,) = stage_pods(pods, name, "parent")
    pods.evict(pod["metadata"]["name"])
    done = submit("--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert starts(store, name, "parent") == 2
    assert starts(store, name, "data") == 1


def test_a_cancelled_run_ends_its_pods_and_is_recorded(
    tmp_path: Path, new_store: Callable[[], str], pods: Cluster, server: KfpServer
) -> None:
    submit = SubmitCommand(write_recipe(tmp_path, "kfp-test-cancelled", parent_pretrain=LONG, sft=None), new_store())
    assert submit().returncode == 0
    name, store = only_run(submit.store), open_store(submit.store)
    pods.wait("the stage works", lambda: starts(store, name, "parent"), PATIENCE_S)
    assert submit("--cancel").returncode == 0
    ended = pods.wait("the run has ended", lambda: (run := server.find_run(name)) and not run.is_active and run)
    assert ended.state in {"CANCELED", "FAILED"}  # KFP's agent may miss the time in which the run is ended
    assert run_record(store, name)["status"] == "interrupted"
    pods.wait("no pod runs", lambda: not [pod for pod in stage_pods(pods, name) if pod["status"]["phase"] == "Running"])
    again = submit("--cancel")
    assert again.returncode == 2
    assert f"no run {name} to cancel" in again.stderr


def equals(name: str) -> str:
    """KFP's filter for a display name."""
    return json.dumps({"predicates": [{"operation": 1, "key": "display_name", "stringValue": name}]})


def runs_of(client: Any, server: KfpServer, name: str) -> list[Any]:
    """The runs of a name on the server."""
    return list(client.list_runs(filter=equals(name), page_size=100, namespace=server.namespace).runs or [])


def named(found: list[Artifact], name: str) -> list[Artifact]:
    """Artifacts of one parameter, of all tasks."""
    return [each for each in found if each.name == name]


def stage_pods(pods: Cluster, run: str, stage: str | None = None) -> list[Any]:
    """Pods of the containers of a run, without those of KFP's drivers."""
    selector = f"{RUN_LABEL}={run}" + (f",{STAGE_LABEL}={stage}" if stage else "")
    return pods.all("v1", "Pod", label_selector=selector)


def stage_results(store: Store, run: str) -> list[StageRecord]:
    """The records of the stages of a run."""
    records = [store.stage_record(stage["key"]) for stage in stage_documents(store, run).values()]
    return [record for record in records if record is not None]


def starts(store: Store, run: str, stage: str) -> int:
    """How often a stage began to compute."""
    if run not in run_names(store):
        return 0
    fetch_events(store, run)
    return sum(event["type"] == "start" for event in EventFile(events_path(store, run, stage)).read())
