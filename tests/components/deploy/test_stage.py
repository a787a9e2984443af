"""Deployment of a model whose replies are known, with a real server."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

from components.core.base.errors import CheckpointError, StageFailed
from components.core.runtime.context import StageContext
from components.core.serving.start_report import STARTING
from components.core.text.chat import Mode
from components.deploy.config import DeployConfig, Gate
from components.deploy.gate import measurements
from components.deploy.stage import converse, run
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
    monkeypatch.setattr("components.deploy.stage.smoke_test", lambda config, bundle, context: [])


def test_the_bundle_is_served_in_both_modes_whole_and_streamed_alike(
    model: Path, metrics: Path, recorded_context: StageContext, recorder: Recorder, tmp_path: Path
) -> None:
    result = run(CONFIG, context=recorded_context, out=tmp_path, model=model, metrics=metrics)

    assert result["smoke"] == [
        {
            "question": question,
            "mode": mode,
            "reasoning": reasoning,
            "answer": "42",
            "streamed": {"reasoning": reasoning, "answer": "42"},
            "same_when_streamed": True,
            "format_ok": True,
        }
        for question in CONFIG.questions
        for mode, reasoning in (("on", "6*7"), ("off", ""))
    ]
    assert recorder.notes == []
    assert (result["alias"], result["registered_model"]) == ("candidate", "tiny")
    progress = [(event["what"], event["done"]) for event in recorder.events if event["type"] == "progress"]
    assert progress[0] == (STARTING, 0)
    assert [done for what, done in progress if what == "smoke test"] == [1, 2, 3, 4]
    bundle = tmp_path / "bundle"
    assert {file.name for file in bundle.iterdir()} == {file.name for file in model.iterdir()}
    changed = [file.name for file in model.iterdir() if (bundle / file.name).read_bytes() != file.read_bytes()]
    assert changed == ["generation_config.json"]
    before, after = (json.loads((folder / changed[0]).read_text()) for folder in (model, bundle))
    assert after == {**before, "do_sample": True, "temperature": 0.6, "top_p": 0.95}


@pytest.mark.parametrize(("threshold", "passed"), [(0.75, True), (0.8, False)])
@pytest.mark.usefixtures("without_server")
def test_the_gate_compares_what_was_measured_with_its_thresholds(
    threshold: float,
    passed: bool,
    model: Path,
    metrics: Path,
    recorded_context: StageContext,
    recorder: Recorder,
    tmp_path: Path,
) -> None:
    config = CONFIG.model_copy(update={"gate": Gate(min_accuracy=threshold)})
    result = run(config, context=recorded_context, out=tmp_path, model=model, metrics=metrics)

    assert result["alias"] == "candidate"
    checked = {"check": "min_accuracy", "threshold": threshold, "value": 0.75, "interval": None, "passed": passed}
    assert result["gate"] == {"passed": passed, "checks": [checked]}
    note = "the gate is not passed: min_accuracy=0.8 (found 0.75)"
    assert recorder.notes == ([] if passed else [note])
    assert (tmp_path / "bundle" / "config.json").is_file()


@pytest.mark.usefixtures("without_server")
def test_a_gate_may_stop_the_stage(model: Path, metrics: Path, recorded_context: StageContext, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"gate": Gate(min_accuracy=0.8), "fail_on_gate": True})
    with pytest.raises(StageFailed, match=r"min_accuracy=0\.8 \(found 0\.75\)"):
        run(config, context=recorded_context, out=tmp_path, model=model, metrics=metrics)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("without_server")
@pytest.mark.parametrize("gate", [Gate(), Gate(min_accuracy=0.0)])
def test_a_model_that_nobody_measured_is_a_candidate(
    gate: Gate, model: Path, recorded_context: StageContext, recorder: Recorder, tmp_path: Path
) -> None:
    result = run(CONFIG.model_copy(update={"gate": gate}), context=recorded_context, out=tmp_path, model=model)

    assert result["alias"] == "candidate"
    assert not result["gate"]["passed"]
    assert recorder.notes == ["the gate is not passed: nothing was measured"]


def test_the_model_is_looked_up_by_role_else_the_last_one_counts(metrics: Path) -> None:
    assert measurements(metrics, "sft") == MODELS["sft"]
    assert measurements(metrics, "pretrained") == MODELS["rl"]


@pytest.mark.usefixtures("without_server")
def test_a_model_that_cannot_be_told_to_think_is_refused(
    model: Path, recorded_context: StageContext, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="no toggle"):
        run(CONFIG, context=recorded_context, out=tmp_path, model=tmp_path / "base")


class Reply(SimpleNamespace):
    """A message, or a piece of one, as the client gives it."""

    def __init__(self, reasoning: str | None, content: str | None) -> None:
        super().__init__(model_extra={"reasoning": reasoning}, content=content)


def talk_with(monkeypatch: pytest.MonkeyPatch, whole: Reply, pieces: list[Reply], mode: Mode) -> dict[str, Any]:
    """A conversation with a client that has its replies from here."""

    def create(*, stream: bool = False, **_: Any) -> Any:
        if not stream:
            return SimpleNamespace(choices=[SimpleNamespace(message=whole)])
        return [SimpleNamespace(choices=[SimpleNamespace(delta=piece)]) for piece in pieces]

    client = MagicMock()
    client.return_value.__enter__.return_value.chat.completions.create = create
    monkeypatch.setattr("components.deploy.stage.OpenAI", client)
    return converse("", "6*7=", mode, 8)


def test_pieces_of_a_reply_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [Reply("6*", None), Reply("7", None), Reply(None, "4"), Reply(None, "2")]
    talk = talk_with(monkeypatch, Reply("6*7", "42"), pieces, "on")

    assert talk["streamed"] == {"reasoning": "6*7", "answer": "42"}
    assert talk["same_when_streamed"]
    assert talk["format_ok"]


@pytest.mark.parametrize(
    ("mode", "reasoning", "answer"), [("on", None, "42"), ("on", "6*7", None), ("off", "6*7", "42"), ("off", None, "")]
)
def test_a_reply_without_the_format_of_its_mode_is_told(
    mode: Mode, reasoning: str | None, answer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = Reply(reasoning, answer)
    talk = talk_with(monkeypatch, reply, [reply], mode)

    assert not talk["format_ok"]
    assert talk["same_when_streamed"]


def test_a_server_that_streams_a_tag_as_text_fails_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageFailed, match="streams </think> as text"):
        talk_with(monkeypatch, Reply("6*7", "42"), [Reply("6*7", None), Reply(None, "</think>42")], "on")
