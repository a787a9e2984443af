from pathlib import Path
from typing import Any

from components.core.lineage.pipeline_runs import Attempt, PipelineRuns, last_attempt
from components.core.lineage.replay import deliver
from components.core.lineage.tracking import tracking
from components.core.store.store import open_store
from tests.components.core.lineage.test_mlflow_run import LABELS, recorded_run
from tests.mlflow_database import new_database


def start(key: str, time: float) -> dict[str, Any]:
    return {"type": "start", "time": time, "stage": "sft", "label": "sft", "key": key}


def test_the_last_attempt_counts_and_ends_as_its_events_say() -> None:
    failed = {"type": "failed", "time": 2.0, "error": "no space\nleft", "hint": None, "exit_code": 1}
    assert last_attempt([]) is None
    assert last_attempt([start("k", 1.0), failed]) == Attempt("sft", "sft", "k", 1.0, "FAILED", 2.0, "no space")
    again = last_attempt([start("k", 1.0), failed, start("l", 3.0)])
    assert again == Attempt("sft", "sft", "l", 3.0)
    assert last_attempt([{"type": "finish", "time": 4.0}], again) == Attempt("sft", "sft", "l", 3.0, "FINISHED", 4.0)


def test_a_pipeline_that_two_machines_created_at_once_becomes_one_run_with_all_stages(tmp_path: Path) -> None:
    store, uri = open_store(tmp_path / "store"), f"sqlite:///{new_database(tmp_path / 'mlflow.db')}"
    record = store.document(f"runs/{recorded_run(store, 'demo-1')}/run.json")
    keys = {label: store.document(f"runs/demo-1/stages/{label}.json")["key"] for label in ("sft", "rl")}
    with tracking(uri) as client:
        runs = PipelineRuns(client, store, record, uri)
        runs.stage("sft", "sft", keys["sft"], 1.0)
        tags = runs.tags() | {"tessera.dev/part": "pipeline"}
        runs.pipeline = client.create_run(runs.experiment_id, tags=tags, run_name="demo-1")
        runs.stage("rl", "rl", keys["rl"], 1.0)

        deliver(store, "demo-1", uri)
        found = list(client.search_runs([runs.experiment_id], max_results=1000))
    (pipeline,) = [run for run in found if "tessera.dev/part" in run.data.tags]
    below = [run for run in found if run.data.tags.get("mlflow.parentRunId") == pipeline.info.run_id]
    assert sorted(run.info.run_name for run in below) == sorted(LABELS)
    assert len(found) == len(below) + 1
    assert {run.info.status for run in found} == {"FINISHED"}
