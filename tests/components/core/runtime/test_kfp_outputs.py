"""What KFP's launcher takes from a container: files of artifacts, their metadata, and the message of a failure."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import DataError, RecipeError, TesseraError
from components.core.runtime.kfp_outputs import (
    MAX_TERMINATION_BYTES,
    METRICS,
    REPORT,
    SUMMARY,
    ExecutorInput,
    model_artifact,
    show_stage,
    write_failure,
)
from components.core.store.store import StageRecord, Store, open_store
from components.sft.config import STAGE
from tests.components.core.fake_stage import numbers_folder

TYPES = {METRICS: "Metrics", SUMMARY: "Markdown", model_artifact("tuned"): "Model", REPORT: "HTML"}
ROOT_URI = "minio://mlpipeline/v2/artifacts/llama-nemotron/097f0fa9/sft/3dbe9df7"


def executor_input(folder: Path) -> str:
    """The JSON that the launcher puts in the place of its placeholder."""
    artifacts = {
        name: {
            "artifacts": [
                {"name": name, "type": {"schemaTitle": f"system.{kind}"}, "uri": f"{ROOT_URI}/{name}", "metadata": {}}
            ]
        }
        for name, kind in TYPES.items()
    }
    digest = {"tuned": {"outputFile": str(folder / "kfp/outputs/tuned")}}
    outputs = {"parameters": digest, "artifacts": artifacts, "outputFile": str(folder / "kfp_outputs/metadata.json")}
    return json.dumps({"inputs": {"parameterValues": {"label": "sft"}}, "outputs": outputs})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def shown(store: Store, tmp_path: Path) -> dict[str, Any]:
    """The executor output of a finished stage, by name of the artifact."""
    model = numbers_folder(tmp_path / "model", 1)
    (model / "config.json").write_text("{}")
    digest = store.put_folder(model, "model").digest
    record = StageRecord(
        key="f" * 64,
        stage="sft",
        config={"num_steps": 3, "schedule": {"warmup_steps": 1}},
        code="c",
        outputs={"tuned": digest},
        result={"loss": 0.5, "splits": {"test": 2}, "diverged": False, "worst": float("nan"), "note": "a|b"},
        seconds=7.25,
    )
    given = ExecutorInput(executor_input(tmp_path), tmp_path)
    show_stage(given, STAGE, record, store, "sft", "http://mlflow:5000")
    output = json.loads((tmp_path / "kfp_outputs/metadata.json").read_text())
    assert output.keys() == {"artifacts"}
    return {name: several["artifacts"][0] for name, several in output["artifacts"].items()}


def local(tmp_path: Path, name: str) -> Path:
    """Where the launcher looks for the file of an artifact."""
    return tmp_path / "minio" / ROOT_URI.removeprefix("minio://") / name


def test_every_artifact_has_the_name_type_and_address_that_the_launcher_declared(shown: dict[str, Any]) -> None:
    assert shown.keys() == {METRICS, SUMMARY, model_artifact("tuned")}
    for name, artifact in shown.items():
        assert artifact["name"] == name
        assert artifact["type"] == {"schemaTitle": f"system.{TYPES[name]}"}
        assert artifact["uri"] == f"{ROOT_URI}/{name}"


def test_metrics_are_the_finite_numbers_of_the_result(shown: dict[str, Any]) -> None:
    assert shown[METRICS]["metadata"] == {"loss": 0.5, "splits.test": 2.0, "seconds": 7.25}


def test_a_model_is_found_by_its_metadata(shown: dict[str, Any], store: Store, tmp_path: Path) -> None:
    metadata = shown[model_artifact("tuned")]["metadata"]
    assert store.manifest(metadata["digest"]).kind == "model"
    assert metadata["address"] == f"{store.uri}#{metadata['digest']}"
    assert (metadata["stage_key"], metadata["mlflow"]) == ("f" * 64, "http://mlflow:5000")
    assert json.loads(local(tmp_path, model_artifact("tuned")).read_text()) == metadata


def test_the_page_has_a_row_for_each_result_and_setting(shown: dict[str, Any], tmp_path: Path) -> None:
    page = local(tmp_path, SUMMARY).read_text()
    for row in ("| loss | 0.5 |", "| note | a b |", "| schedule.warmup_steps | 1 |", "| MLflow | http://mlflow:5000 |"):
        assert row in page.splitlines()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"outputs": {}}'])
def test_what_is_no_executor_input_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="no executor input"):
        ExecutorInput(text)


def test_an_error_becomes_the_message_of_the_container(tmp_path: Path) -> None:
    message = tmp_path / "termination-log"
    write_failure(DataError("row 3", hint="mend it"), message)
    assert not message.exists()  # outside a pod
    message.touch()
    write_failure(DataError("row 3", hint="mend it"), message)
    assert message.read_text() == "DataError: row 3\n  hint: mend it"
    write_failure(TesseraError("ü" * 5000), message)
    assert len(message.read_bytes()) <= MAX_TERMINATION_BYTES
