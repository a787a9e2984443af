"""The whole evaluation with real servers, on models whose answers are known."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from components.core.base.errors import CheckpointError, DataError, InputError
from components.core.model.checkpoint import save_model
from components.core.runtime.context import Interrupted, quiet_context
from components.core.serving.load_profile import Workload
from components.core.serving.server import Server
from components.core.text.chat import END_THINK, parse_answer, plain_answer
from components.eval.client import num_samples
from components.eval.config import EvalConfig
from components.eval.scores import interval
from components.eval.serving import group_by_architecture
from components.eval.stage import run
from tests.components.conftest import write_rows
from tests.components.core import tiny_models

CONFIG = EvalConfig(
    num_problems=3,
    num_samples=3,
    max_tokens=8,
    temperature=0.1,  # as good as greedy for models that are this certain
    workload=Workload(batch_size=2, prompt_tokens=4, new_tokens=8, rounds=1),
    seed=1,
)
EXPECTED = {"standard": ["42", "13", "42", "42"], "hard": ["13", "42"]}
"""Correct answers of the problems; the fourth is beyond `num_problems`."""


def record_calls(patch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Record every start of a server, and the version of every weight swap."""
    start, swap = Server.start, Server.swap_weights

    def recorded_start(server: Server) -> None:
        calls.append("start")
        start(server)

    def recorded_swap(server: Server, folder: Path, version: str) -> None:
        calls.append(version)
        swap(server, folder, version)

    patch.setattr(Server, "start", recorded_start)
    patch.setattr(Server, "swap_weights", recorded_swap)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models of one architecture."""
    root = tmp_path_factory.mktemp("models")
    thinking = ["<on>", "<think>", "6", "*", "7", "</think>"]
    models = {
        "parent": tiny_models.speaker(["=", "4", "2", "<eos>"]),
        "sft": tiny_models.speaker([*thinking, "4"], ["<off>", "4", "2", "<eos>"]),
        "rl": tiny_models.speaker([*thinking, "1"], ["<off>", "1", "3", "<eos>"]),
    }
    return {name: tiny_models.write(model, root / name) for name, model in models.items()}


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("problems")
    for split, answers in EXPECTED.items():
        rows = (
            {"id": f"{split}-{i}", "question": "6*7=", "prompt": "6*7=", "answer": a} for i, a in enumerate(answers)
        )
        write_rows(folder / f"test-{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def evaluation(folders: dict[str, Path], problems: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One evaluation: its result, metrics and answers, and the starts and weight swaps of its servers."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "out" / "metrics").mkdir(parents=True)
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        record_calls(patch, calls)
        result = run(CONFIG, context=quiet_context(folder / "job"), out=folder / "out", problems=problems, **folders)
    lines = (folder / "out" / "metrics" / "answers.jsonl").read_text().splitlines()
    return {
        "result": result,
        "metrics": json.loads((folder / "out" / "metrics" / "metrics.json").read_text()),
        "answers": [json.loads(line) for line in lines],
        "calls": calls,
    }


def test_models_of_one_architecture_share_a_server(evaluation):
    assert evaluation["calls"] == ["start", "sft", "rl"]


def test_accuracies_are_those_of_models_that_always_say_the_same(evaluation):
    models = evaluation["metrics"]["models"]

    assert list(models) == ["parent", "sft", "rl"]
    assert models["sft"]["accuracy"] == {"standard": {"on": 2 / 3, "off": 2 / 3}, "hard": {"on": 0.5, "off": 0.5}}
    assert models["rl"]["accuracy"] == {"standard": {"on": 1 / 3, "off": 1 / 3}, "hard": {"on": 0.5, "off": 0.5}}
    assert models["sft"]["format"] == models["rl"]["format"] == {"on": 1.0, "off": 1.0}
    assert models["parent"]["accuracy"]["standard"] == {"on": 2 / 3, "off": None}
    assert models["parent"]["format"] == {"on": None, "off": None}
    assert evaluation["result"] == {"models": {name: row["accuracy"] for name, row in models.items()}}
    assert evaluation["metrics"]["settings"] == CONFIG.canonical()


def test_every_problem_is_asked_in_every_mode_as_often_as_configured(evaluation):
    asked = [(row["model"], row["split"], row["mode"], row["id"], len(row["samples"])) for row in evaluation["answers"]]
    modes = [
        ("parent", "plain", 1),
        *((role, mode, n) for role in ("sft", "rl") for mode, n in (("on", 3), ("off", 1))),
    ]
    ids = [("standard", f"standard-{i}") for i in range(3)] + [("hard", f"hard-{i}") for i in range(2)]

    assert sorted(asked) == sorted((role, split, mode, name, n) for role, mode, n in modes for split, name in ids)
    assert {(row["model"], row["mode"]): set(row["samples"]) for row in evaluation["answers"]} == {
        ("parent", "plain"): {"42"},
        ("sft", "on"): {"<think>6*7</think>42"},
        ("sft", "off"): {"42"},
        ("rl", "on"): {"<think>6*7</think>13"},
        ("rl", "off"): {"13"},
    }


def test_a_recount_from_the_answers_gives_the_metrics(evaluation):
    """From the text of the answers alone, without the grades in their rows."""
    for name, row in evaluation["metrics"]["models"].items():
        for split in EXPECTED:
            for mode in ("on", "off"):
                prompt_mode = "plain" if name == "parent" and mode == "on" else mode
                found = [
                    a
                    for a in evaluation["answers"]
                    if (a["model"], a["split"], a["mode"]) == (name, split, prompt_mode)
                ]
                if not found:
                    assert row["accuracy"][split][mode] is None
                    continue
                said = [
                    [plain_answer(t) if prompt_mode == "plain" else parse_answer(t)[1] for t in a["samples"]]
                    for a in found
                ]
                right = [[text == a["expected"] for text in texts] for a, texts in zip(found, said, strict=True)]
                share = sum(sum(each) / len(each) for each in right) / len(right)
                assert row["accuracy"][split][mode] == pytest.approx(share)
                assert row["interval"][split][mode] == pytest.approx(interval(right))
                if prompt_mode != "plain":
                    has_format = [(END_THINK in text) == (mode == "on") for a in found for text in a["samples"]]
                    assert all(has_format) == (row["format"][mode] == 1.0)


def test_size_and_speed_are_those_of_the_architecture(evaluation):
    rows = evaluation["metrics"]["models"].values()
    expected = sum(parameter.numel() for parameter in tiny_models.llama(0).parameters())

    assert {row["parameters"] for row in rows} == {expected}
    assert {row["kv_bytes_per_token"] for row in rows} == {3 * 2 * 2 * 32 * 2}  # layers, K and V, heads, size, bfloat16
    assert len({row["tokens_per_second"] for row in rows}) == 1
    assert min(row["tokens_per_second"] for row in rows) > 0


def test_an_interrupted_evaluation_goes_on_with_the_models_that_are_left(evaluation, folders, problems, tmp_path):
    """Interrupted while the second model answers: the next run starts there, and does not measure speeds again."""
    context = quiet_context(tmp_path)
    calls: list[str] = []
    (tmp_path / "metrics").mkdir()
    context.stopping = lambda: "sft" in calls
    with pytest.MonkeyPatch.context() as patch:
        record_calls(patch, calls)
        patch.setattr("components.eval.stage.measure_step_ms", lambda folders, *_, **__: [[8.0]] * len(folders))
        with pytest.raises(Interrupted):
            run(CONFIG, context=context, out=tmp_path, problems=problems, **folders)
        context.stopping = lambda: False
        patch.setattr("components.eval.stage.measure_step_ms", None)
        run(CONFIG, context=context, out=tmp_path, problems=problems, **folders)

    assert calls == ["start", "sft", "start", "rl"]
    lines = (tmp_path / "metrics" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == evaluation["answers"]
    metrics = json.loads((tmp_path / "metrics" / "metrics.json").read_text())
    assert {row["tokens_per_second"] for row in metrics["models"].values()} == {1000 * 2 / 8}


def test_a_problem_that_is_too_long_for_the_model_is_named(folders, tmp_path):
    row = {"id": "long", "question": "7" * 600, "prompt": "7" * 600, "answer": "7"}
    write_rows(tmp_path / "test-standard.jsonl", [row])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("components.eval.stage.measure_step_ms", lambda folders, *_, **__: [[8.0]])
        with pytest.raises(DataError, match=r"problem long of test-standard cannot be asked: .*length"):
            run(CONFIG, context=quiet_context(tmp_path), out=tmp_path, problems=tmp_path, parent=folders["parent"])


def test_a_server_is_shared_by_models_that_differ_in_their_weights_alone(folders, tmp_path):
    parent, sft, rl = (folders[role] for role in ("parent", "sft", "rl"))
    other_end = Path(shutil.copytree(rl, tmp_path / "other-end"))
    generation = json.loads((rl / "generation_config.json").read_text())
    (other_end / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": 5}))
    wider = tiny_models.write(tiny_models.llama(0, intermediate_size=64), tmp_path / "wider")
    models = {"parent": parent, "child": wider, "sft": sft, "rl": rl}

    assert group_by_architecture(models) == [["parent", "sft", "rl"], ["child"]]
    assert group_by_architecture({**models, "rl": other_end}) == [["parent", "sft"], ["rl"], ["child"]]


def test_gaps_in_the_numbers_of_layers_are_no_difference(tmp_path):
    model = tiny_models.heterogeneous(0)
    save_model(model, tmp_path / "distilled", tokenizer=None)
    save_model(model, tmp_path / "child", tokenizer=None, by_block=True, numbers=[0, 2, 3, 7])
    assert group_by_architecture({role: tmp_path / role for role in ("child", "distilled")}) == [["child", "distilled"]]


def test_a_tuned_model_without_the_toggle_is_refused(folders, tmp_path):
    base = Path(shutil.copytree(folders["sft"], tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="tokenizer of sft has no toggle"):
        run(CONFIG, context=quiet_context(tmp_path), out=tmp_path, problems=tmp_path, sft=base)


def test_a_greedy_answer_is_requested_once():
    assert [num_samples(CONFIG, mode) for mode in ("on", "off", "plain")] == [3, 1, 1]
    assert num_samples(CONFIG.model_copy(update={"temperature": 0.0}), "on") == 1


def test_without_a_model_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(InputError, match="no model to evaluate"):
        run(CONFIG, context=quiet_context(tmp_path), out=tmp_path, problems=tmp_path, sft=None)
