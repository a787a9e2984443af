import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.core.base.flat_values import flatten, numbers
from components.core.lineage import mlflow_run as lineage
from components.core.lineage.champion import champion, move_champion
from components.core.lineage.curves import record_curves
from components.core.lineage.replay import deliver, sync_pending_runs
from components.core.lineage.tracking import LineageError, without_password
from components.core.store.store import Store, open_store
from pipelines.records.runs import artifacts
from pipelines.report.summary import build_summary
from tests.mlflow_database import new_database
from tests.pipelines.made_up_run import MEASURED, SEARCH, make_run

LABELS = {
    *("data", "parent", "search/importance", "search/costs", "search"),
    *(f"search/{step}-{shard}" for step in ("library", "scores") for shard in (0, 1)),
    *("distill", "pretrain", "sft", "rl", "eval", "deploy"),
}


def recorded_run(store: Store, name: str, **how: Any) -> str:
    """A made-up run with what is written at its end."""
    make_run(store, name, **how)
    record_curves(store, name)
    store.put_document(f"runs/{name}/summary.json", build_summary(store, name))
    return name


class Delivered:
    """A store with two runs, the second of them cached, and an MLflow database that knows both."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(folder / "store")
        self.uri = f"sqlite:///{new_database(folder / 'mlflow.db')}"
        deliver(self.store, recorded_run(self.store, "demo-1"), self.uri)
        deliver(self.store, recorded_run(self.store, "demo-2", cached=True), self.uri)
        self.client = MlflowClient(self.uri, registry_uri=self.uri)
        experiment = self.client.get_experiment_by_name("demo")
        assert experiment is not None
        self.experiments = [experiment.experiment_id]

    def runs(self, where: str = "") -> dict[str, Any]:
        found = self.client.search_runs(self.experiments, where, max_results=1000)
        names = [run.info.run_name for run in found]
        assert len(names) == len(set(names)), f"runs twice: {sorted(names)}"
        return {run.info.run_name: run for run in found}

    def pipeline(self, name: str) -> Any:
        return self.runs("tags.`tessera.dev/part` = 'pipeline'")[name]

    def stages(self, name: str) -> dict[str, Any]:
        return self.runs(f"tags.`mlflow.parentRunId` = '{self.pipeline(name).info.run_id}'")

    def whole(self, name: str, label: str) -> Any:
        """A stage's run with the models that went in, which a search leaves out."""
        return self.client.get_run(self.stages(name)[label].info.run_id)

    def models(self) -> dict[str, Any]:
        found = self.client.search_logged_models(self.experiments)
        assert len({model.tags["tessera.dev/digest"] for model in found}) == len(found)
        return {model.name: model for model in found}

    def row_counts(self) -> dict[str, int]:
        tables = ("runs", "metrics", "params", "tags", "inputs", "datasets", "logged_models", "logged_model_metrics")
        with sqlite3.connect(self.uri.removeprefix("sqlite:///")) as database:
            return {
                table: database.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
                for table in (*tables, "model_versions")
            }


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    return Delivered(tmp_path_factory.mktemp("lineage"))


def test_a_pipeline_is_a_run_and_a_stage_is_a_run_below_it(delivered: Delivered) -> None:
    assert set(delivered.stages("demo-1")) == LABELS
    assert set(delivered.stages("demo-2")) == LABELS
    for name in ("demo-1", "demo-2"):
        runs = [delivered.pipeline(name), *delivered.stages(name).values()]
        assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_stage_carries_its_settings_curves_key_and_code(delivered: Delivered) -> None:
    run = delivered.stages("demo-1")["distill"]
    record = delivered.store.stage_record(run.data.tags["tessera.dev/stage-key"])
    assert record is not None
    assert run.data.tags["tessera.dev/code-digest"] == record.code
    assert run.data.tags["tessera.dev/stage"] == "distill"
    assert run.data.tags["tessera.dev/output.distilled"].endswith(f"#{record.outputs['distilled']}")
    assert run.data.params["global_batch_size"] == str(record.config["global_batch_size"])
    history = delivered.client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == list(range(1, 201))
    assert run.data.metrics["result/loss"] == 0.034


def test_a_cached_stage_shows_the_same_curve_as_the_one_that_computed_it(delivered: Delivered) -> None:
    first, second = (delivered.stages(run)["rl"] for run in ("demo-1", "demo-2"))
    assert (first.data.tags["tessera.dev/cached"], second.data.tags["tessera.dev/cached"]) == ("false", "true")
    assert first.data.metrics["reward"] == second.data.metrics["reward"]


def test_two_pipelines_compare_by_recipe_and_by_the_numbers_of_every_model(delivered: Delivered) -> None:
    for name in ("demo-1", "demo-2"):
        run = delivered.pipeline(name)
        assert run.data.params["seed"] == "7"
        assert run.data.metrics["rl/accuracy.hard.on"] == 0.668
        assert run.data.metrics["child/tokens_per_second"] == MEASURED["child"][0]
        assert run.data.metrics["target/tokens per second child over parent"] == pytest.approx(7104 / 3612)


def test_data_goes_in_by_digest(delivered: Delivered) -> None:
    data = {found.dataset.name: found.dataset for found in delivered.stages("demo-1")["sft"].inputs.dataset_inputs}
    chats = artifacts(delivered.store, "demo-1")["chats"]
    assert chats.startswith(data["chats"].digest)
    assert chats in data["chats"].source
    for name in ("demo-1", "demo-2"):
        data = {found.dataset.name: found.dataset for found in delivered.pipeline(name).inputs.dataset_inputs}
        assert set(data) == {"corpus", "chats", "problems"}
        assert chats.startswith(data["chats"].digest)


def test_every_model_is_known_once_with_the_models_it_was_made_from(delivered: Delivered) -> None:
    models, digests = delivered.models(), artifacts(delivered.store, "demo-1")
    assert set(models) == {"parent", "child", "random", "greedy", "distilled", "pretrained", "sft", "rl"}
    distilled = models["distilled"].tags
    assert distilled["tessera.dev/made-from.teacher"] == digests["parent"]
    assert distilled["tessera.dev/made-from.student"] == digests["child"]
    assert models["parent"].params["parameters"] == "3165312"
    assert int(models["child"].params["layers"]) == len(SEARCH.child.fused_layers)
    run = delivered.whole("demo-2", "distill")
    assert [found.model_id for found in run.outputs.model_outputs] == [models["distilled"].model_id]
    assert {found.model_id for found in run.inputs.model_inputs} == {
        models["parent"].model_id,
        models["child"].model_id,
    }


def test_what_was_measured_is_tied_to_the_model_and_the_problems(delivered: Delivered) -> None:
    metrics = {metric.key: metric for metric in delivered.models()["sft"].metrics}
    assert metrics["accuracy.hard.off"].value == 0.128
    assert artifacts(delivered.store, "demo-1")["problems"].startswith(metrics["accuracy.hard.off"].dataset_digest)


def test_the_deployed_bundle_is_one_version_and_a_candidate(delivered: Delivered) -> None:
    versions = delivered.client.search_model_versions("name = 'tessera'")
    candidate = delivered.client.get_model_version_by_alias("tessera", "candidate")
    assert [version.version for version in versions] == [candidate.version]
    assert delivered.client.get_registered_model("tessera").aliases == {"candidate": candidate.version}
    assert candidate.tags["tessera.dev/digest"] == artifacts(delivered.store, "demo-2")["bundle"]
    assert candidate.tags["tessera.dev/gate.passed"] == "True"


def test_the_alias_of_the_champion_follows_the_store_at_once_or_with_the_next_delivery(tmp_path: Path) -> None:
    store, uri = open_store(tmp_path / "store"), f"sqlite:///{new_database(tmp_path / 'mlflow.db')}"
    bundle = artifacts(store, recorded_run(store, "demo-1"))["bundle"]
    client = MlflowClient(uri, registry_uri=uri)

    def aliases() -> list[list[str]]:
        return [sorted(model.aliases) for model in client.search_registered_models("name = 'tessera'")]

    move_champion(store, "tessera", bundle, uri)  # MLflow does not have the bundle yet
    assert aliases() == []
    deliver(store, "demo-1", uri)
    assert aliases() == [["candidate", "champion"]]
    client.delete_registered_model_alias("tessera", "champion")
    move_champion(store, "tessera", bundle, uri)
    assert aliases() == [["candidate", "champion"]]
    assert champion(store, "tessera") == bundle


def test_delivering_again_changes_nothing(delivered: Delivered) -> None:
    before = delivered.row_counts()
    deliver(delivered.store, "demo-1", delivered.uri)
    assert delivered.row_counts() == before


@pytest.mark.parametrize("step", ["_log_inputs", "_log_outputs", "_register"])
def test_a_delivery_that_broke_off_is_taken_up_without_doubles(
    delivered: Delivered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store = open_store(tmp_path)
    recorded_run(store, f"demo-{step}")
    calls = []

    def break_off(*values: object) -> None:
        calls.append(values)
        raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(lineage.Pipeline, step, break_off)
        with pytest.raises(LineageError, match="the power went"):
            deliver(store, f"demo-{step}", delivered.uri)
    assert sync_pending_runs(store, delivered.uri) == [f"demo-{step}"]
    assert len(calls) == 1
    stages = delivered.stages(f"demo-{step}")
    inputs = delivered.whole(f"demo-{step}", "distill").inputs.model_inputs
    assert len(inputs) == len({found.model_id for found in inputs}) == 2
    assert set(stages) == LABELS
    assert {run.info.status for run in stages.values()} == {"FINISHED"}
    assert sync_pending_runs(store, delivered.uri) == []


def test_a_run_that_went_on_after_a_failure_is_delivered_again(delivered: Delivered, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    recorded_run(store, "demo-failed")
    whole, later = store.document("runs/demo-failed/run.json"), store.document("runs/demo-failed/stages/rl.json")
    store.put_document("runs/demo-failed/run.json", whole | {"status": "failed"})
    store.backend.delete("runs/demo-failed/stages/rl.json")
    assert sync_pending_runs(store, delivered.uri) == ["demo-failed"]
    assert delivered.pipeline("demo-failed").info.status == "FAILED"
    assert "rl" not in delivered.stages("demo-failed")

    store.put_document("runs/demo-failed/stages/rl.json", later)
    store.put_document("runs/demo-failed/run.json", whole)
    assert sync_pending_runs(store, delivered.uri) == ["demo-failed"]
    assert delivered.pipeline("demo-failed").info.status == "FINISHED"
    assert set(delivered.stages("demo-failed")) == LABELS


def test_a_server_that_is_down_is_one_error_that_says_what_becomes_of_the_records(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    make_run(store)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        uri = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LineageError, match="took no records") as error:
            deliver(store, "demo-1", uri)
    assert "secret" not in str(error.value)
    assert "the next run or `tessera ui` delivers them" in str(error.value)
    assert store.document("runs/demo-1/mlflow.json") is None


def test_a_password_in_the_address_is_not_written_down() -> None:
    assert without_password("https://user:secret@host:5000/path") == "https://host:5000/path"


def test_settings_are_flat_and_numbers_are_numbers() -> None:
    values = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": True, "f": 2.5}
    assert flatten(values) == {"a.b": 1, "a.c": "[1, 2]", "d": None, "e": True, "f": 2.5}
    assert numbers(values) == {"a.b": 1.0, "f": 2.5}
