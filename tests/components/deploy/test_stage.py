"""Deployment of a model whose replies are known, with a real server."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from components.core.errors import CheckpointError, StageFailed
from components.core.job import Job
from components.deploy.config import DeployConfig, Gate
from components.deploy.stage import measured, run
from tests.components.conftest import Recorder
from tests.components.core import tiny_models

CONFIG = DeployConfig(name="tiny", questions=("6*7=", "7*6="), max_tokens=8)
MODELS: dict[str, Any] = {
    "sft": {"accuracy": {"standard": {"on": 0.5, "off": 0.25}}, "format": {"on": 1.0, "off": 1.0}},
    "rl": {"accuracy": {"standard": {"on": 0.75, "off": 0.25}}, "format": {"on": 1.0, "off": 1.0}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    thinking = ["<on>", "<think>", "6", "*", "7", "</think>", "4"]
    folder = tmp_path_factory.mktemp("model")
    tiny_models.write(tiny_models.speaker(thinking, ["<off>", "4", "2", "<eos>"]), folder)
    for file in folder.iterdir():
        file.chmod(0o400)  # as the store hands it over
    return folder


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "metrics.json").write_text(json.dumps({"models": MODELS}))
    return tmp_path / "metrics"


@pytest.fixture
def without_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.deploy.stage.smoke_test", lambda config, bundle, job: [])


def test_the_bundle_is_served_in_both_modes_whole_and_streamed_alike(
    model: Path, metrics: Path, recorded_job: Job, recorder: Recorder, tmp_path: Path
) -> None:
    result = run(CONFIG, job=recorded_job, out=tmp_path, model=model, metrics=metrics)

    assert result["smoke"] == [
        {"question": question, "mode": mode, "reasoning": reasoning, "answer": "42", "same_when_streamed": True}
        for question in CONFIG.questions
        for mode, reasoning in (("on", "6*7"), ("off", ""))
    ]
    assert (result["alias"], result["registered_model"]) == ("champion", "tiny")
    assert [event["done"] for event in recorder.events] == [1, 2, 3, 4]
    bundle = tmp_path / "bundle"
    assert {file.name for file in bundle.iterdir()} == {file.name for file in model.iterdir()}
    assert all((bundle / file.name).read_bytes() == file.read_bytes() for file in model.iterdir())


@pytest.mark.parametrize(("threshold", "alias"), [(0.75, "champion"), (0.8, "candidate")])
@pytest.mark.usefixtures("without_server")
def test_the_gate_decides_between_champion_and_candidate(
    threshold: float, alias: str, model: Path, metrics: Path, recorded_job: Job, recorder: Recorder, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"gate": Gate(min_accuracy=threshold)})
    result = run(config, job=recorded_job, out=tmp_path, model=model, metrics=metrics)

    passed = alias == "champion"
    assert result["alias"] == alias
    checked = {"check": "min_accuracy", "threshold": threshold, "value": 0.75, "passed": passed}
    assert result["gate"] == {"passed": passed, "checks": [checked]}
    note = "the gate is not passed: min_accuracy=0.8 (found 0.75); the model is registered as a candidate"
    assert recorder.notes == ([] if passed else [note])
    assert (tmp_path / "bundle" / "config.json").is_file()


@pytest.mark.usefixtures("without_server")
def test_a_gate_may_stop_the_stage(model: Path, metrics: Path, recorded_job: Job, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"gate": Gate(min_accuracy=0.8), "fail_on_gate": True})
    with pytest.raises(StageFailed, match=r"min_accuracy=0\.8 \(found 0\.75\)"):
        run(config, job=recorded_job, out=tmp_path, model=model, metrics=metrics)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("without_server")
def test_without_an_evaluation_no_check_is_made(model: Path, recorded_job: Job, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"gate": Gate(min_accuracy=1.0)})

    assert run(config, job=recorded_job, out=tmp_path, model=model)["gate"] == {"passed": True, "checks": []}


def test_the_model_is_looked_up_by_role_else_the_last_one_counts(metrics: Path) -> None:
    assert measured(metrics, "sft") == MODELS["sft"]
    assert measured(metrics, "pretrained") == MODELS["rl"]


@pytest.mark.usefixtures("without_server")
def test_a_model_that_cannot_be_told_to_think_is_refused(model: Path, recorded_job: Job, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="no toggle"):
        run(CONFIG, job=recorded_job, out=tmp_path, model=tmp_path / "base")


def test_a_server_that_streams_another_reply_fails_the_stage(
    model: Path, recorded_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def converse(url: str, question: str, mode: str, max_tokens: int) -> Mapping[str, Any]:
        return {"question": question, "mode": mode, "reasoning": "hm", "answer": "42", "same_when_streamed": False}

    class NoServer:
        url = ""

        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> "NoServer":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("components.deploy.stage.Server", NoServer)
    monkeypatch.setattr("components.deploy.stage.converse", converse)
    with pytest.raises(StageFailed, match="streams another reply"):
        run(CONFIG, job=recorded_job, out=tmp_path, model=model)
