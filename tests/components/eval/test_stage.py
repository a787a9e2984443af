"""The whole evaluation with real servers, on models whose answers are known."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("vllm")

from components.core.base.errors import CheckpointError, DataError, InputError
from components.core.model.checkpoint import save_model
from components.core.runtime.context import Interrupted, quiet_context
from components.core.runtime.placement import Placement
from components.core.runtime.torchrun import run_ranks
from components.core.serving.load_profile import Workload
from components.core.serving.server import Server
from components.core.serving.start_report import STARTING
from components.core.store.store import open_store
from components.core.text.chat import parse_answer
from components.core.text.toggle import END_THINK
from components.eval.answers import EvalCheckpoint
from components.eval.client import num_samples
from components.eval.config import STAGE, EvalConfig, HeldOutText
from components.eval.scores import interval
from components.eval.serving import ANSWERS, group_by_architecture
from components.eval.stage import SPEEDS, run
from tests.components.conftest import Recorder, write_rows
from tests.components.core import tiny_models

CONFIG = EvalConfig(
    num_problems=3,
    num_samples=3,
    max_tokens=8,
    temperature=0.1,  # as good as greedy for models that are this certain
    workload=Workload(batch_size=2, prompt_tokens=4, new_tokens=8, rounds=1),
    held_out=HeldOutText(seq_len=64, batch_size=1, num_batches=1),
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
    """Three models of one architecture; the parent is a base model, without a chat template."""
    root = tmp_path_factory.mktemp("models")
    thinking = ["<on>", "<think>", "6", "*", "7", "</think>"]
    models = {
        "parent": tiny_models.speaker(["=", "4", "2", "<eos>"]),
        "sft": tiny_models.speaker([*thinking, "4"], ["<off>", "4", "2", "<eos>"]),
        "rl": tiny_models.speaker([*thinking, "1"], ["<off>", "1", "3", "<eos>"]),
    }
    folders = {name: tiny_models.write(model, root / name) for name, model in models.items()}
    (folders["parent"] / "chat_template.jinja").unlink()
    return folders


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
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = ["6*7=42", "the cat", "a dog and a hen"]
    write_rows(folder / "validation.jsonl", ({"text": text} for text in texts))
    return folder


@pytest.fixture(scope="module")
def evaluation(
    folders: dict[str, Path], problems: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """One evaluation: its result, metrics and answers, and the starts and weight swaps of its servers."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "out" / "metrics").mkdir(parents=True)
    calls: list[str] = []
    context, recorder = quiet_context(folder / "job"), Recorder()
    context.reporter = recorder
    with pytest.MonkeyPatch.context() as patch:
        record_calls(patch, calls)
        result = run(
            CONFIG,
            context=context,
            out=folder / "out",
            problems=problems,
            corpus=corpus,
            **folders,
        )
    lines = (folder / "out" / "metrics" / "answers.jsonl").read_text().splitlines()
    return {
        "result": result,
        "metrics": json.loads((folder / "out" / "metrics" / "metrics.json").read_text()),
        "answers": [json.loads(line) for line in lines],
        "calls": calls,
        "progress": [event for event in recorder.events if event["type"] == "progress"],
    }


def test_each_phase_reports_progress_from_which_time_left_follows(evaluation):
    phases: dict[str, list[tuple[int, int]]] = {}
    for event in evaluation["progress"]:
        phases.setdefault(event["what"], []).append((event["done"], event["total"]))

    held_out = [f"held-out text of {role}" for role in ("parent", "sft", "rl")]
    assert list(phases) == [SPEEDS, STARTING, *held_out, ANSWERS]
    assert {total for _, total in phases.pop(STARTING)} == {0}  # of a wait nobody knows how long it takes
    assert phases[ANSWERS][0] == (0, 25)  # five problems; two of the three models are asked in two modes
    for reports in phases.values():
        assert sorted(reports) == reports
        assert reports[-1][0] == reports[-1][1]


def test_two_replicas_answer_to_the_scores_of_one(evaluation, folders, problems, corpus, tmp_path):
    """As two processes, each with a server of its own; speed is measured by the first alone, and known here."""
    context, inputs = quiet_context(tmp_path), {"problems": problems, "corpus": corpus, **folders}
    context.placement = Placement(nodes=2, threads=1)
    speed = {"tokens_per_second": 1.0, "tokens_per_second_interval": [0.9, 1.1]}
    EvalCheckpoint(speeds=dict.fromkeys(folders, speed)).save(context.resume)
    (tmp_path / "out" / "metrics").mkdir(parents=True)
    store = open_store(tmp_path / "store")
    result = run_ranks(STAGE, (store, "0" * 64), CONFIG, context=context, out=tmp_path / "out", **inputs)

    lines = (tmp_path / "out" / "metrics" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == evaluation["answers"]
    metrics = json.loads((tmp_path / "out" / "metrics" / "metrics.json").read_text())
    for name, row in evaluation["metrics"]["models"].items():
        assert metrics["models"][name] == {**row, **speed}
    assert result == evaluation["result"]
    assert len(list(context.scratch.glob("server-*.log"))) == 2  # one start of a server a replica


def test_models_of_one_architecture_share_a_server(evaluation):
    """The server starts with a model that has the chat template."""
    assert evaluation["calls"] == ["start", "rl", "parent"]


def test_accuracies_are_those_of_models_that_always_say_the_same(evaluation):
    models = evaluation["metrics"]["models"]

    assert list(models) == ["parent", "sft", "rl"]
    assert models["sft"]["accuracy"] == {"standard": {"on": 2 / 3, "off": 2 / 3}, "hard": {"on": 0.5, "off": 0.5}}
    assert models["rl"]["accuracy"] == {"standard": {"on": 1 / 3, "off": 1 / 3}, "hard": {"on": 0.5, "off": 0.5}}
    assert models["sft"]["format"] == models["rl"]["format"] == {"on": 1.0, "off": 1.0}
    assert models["parent"]["accuracy"]["standard"] == {"on": 2 / 3, "off": None}
    assert models["parent"]["format"] == {"on": None, "off": None}
    assert evaluation["result"]["models"] == {name: row["accuracy"] for name, row in models.items()}
    assert evaluation["metrics"]["settings"] == CONFIG.canonical()


def test_gains_are_paired_by_problem_and_reported_live(evaluation):
    models = evaluation["metrics"]["models"]
    over_sft = models["rl"]["gains"]["over"]["sft"]

    assert over_sft["standard"]["on"]["value"] == pytest.approx(-1 / 3)
    assert over_sft["standard"]["on"]["problems"] == 3
    assert models["sft"]["gains"]["thinking"]["standard"]["value"] == 0
    assert models["parent"]["gains"] == {"thinking": {"standard": None, "hard": None}, "over": {}}
    live = evaluation["result"]["gains"]
    assert live["rl"]["over"]["sft"]["standard"]["on"] == {
        name: over_sft["standard"]["on"][name] for name in ("value", "low", "high")
    }
    assert "parent" not in live  # nothing to compare


def test_every_problem_is_asked_in_every_mode_as_often_as_configured(evaluation):
    asked = [(row["model"], row["split"], row["mode"], row["id"], len(row["samples"])) for row in evaluation["answers"]]
    modes = [
        ("parent", "plain", 3),
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
                    [t.strip() if prompt_mode == "plain" else parse_answer(t)[1] for t in a["samples"]] for a in found
                ]
                right = [[text == a["expected"] for text in texts] for a, texts in zip(found, said, strict=True)]
                share = sum(sum(each) / len(each) for each in right) / len(right)
                assert row["accuracy"][split][mode] == pytest.approx(share)
                assert row["interval"][split][mode] == pytest.approx(interval(right))
                if prompt_mode != "plain":
                    has_format = [(END_THINK in text) == (mode == "on") for a in found for text in a["samples"]]
                    assert all(has_format) == (row["format"][mode] == 1.0)


def test_perplexity_is_that_of_hugging_face(folders, evaluation, corpus):
    """On the whole validation text, row by row and without packing."""
    rows = [json.loads(line)["text"] for line in (corpus / "validation.jsonl").read_text().splitlines()]
    for role, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        losses = []
        for text in rows:
            ids = torch.tensor([[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            losses.append(-logprobs.gather(1, ids[0, 1:, None]))
        measured = evaluation["metrics"]["models"][role]
        assert measured["held_out_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
        assert measured["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-4)
    assert set(evaluation["result"]["perplexity"]) == set(folders)


def test_a_user_without_problems_sees_perplexity_and_speed(folders, corpus, tmp_path, recorded_context, recorder):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "problems").mkdir()
    given = {"problems": tmp_path / "problems", "corpus": corpus, "parent": folders["parent"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("components.eval.stage.measure_step_ms", lambda folders, *_, **__: [[8.0]])
        run(CONFIG, context=recorded_context, out=tmp_path, **given)
    row = json.loads((tmp_path / "metrics" / "metrics.json").read_text())["models"]["parent"]

    assert row["perplexity"] > 1
    assert row["tokens_per_second"] == 1000 * CONFIG.workload.batch_size / 8
    assert row["accuracy"]["standard"] == {"on": None, "off": None}
    assert recorder.notes[-1] == (
        "there are no test problems: models are compared by their perplexity on held-out text"
    )
    assert (tmp_path / "metrics" / "answers.jsonl").read_text() == ""


def test_without_problems_and_text_there_is_nothing_to_evaluate_on(folders, tmp_path):
    with pytest.raises(DataError, match="neither test problems nor held-out text"):
        run(CONFIG, context=quiet_context(tmp_path), out=tmp_path, problems=tmp_path, parent=folders["parent"])


def test_a_chat_parent_is_asked_in_its_own_template(folders, problems, tmp_path):
    """Its template ends a prompt with <on> where the system message does not say off; there is none."""
    folder = tiny_models.write(tiny_models.speaker(["<on>", "4", "2", "<eos>"]), tmp_path / "chat")
    for name in ("tokenizer.json",):  # no tags: a model that never thought
        text = (folder / name).read_text().replace('"<think>"', '"<thunk>"').replace('"</think>"', '"</thunk>"')
        (folder / name).write_text(text)
    (tmp_path / "metrics").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("components.eval.stage.measure_step_ms", lambda folders, *_, **__: [[8.0]])
        run(CONFIG, context=quiet_context(tmp_path / "job"), out=tmp_path, problems=problems, parent=folder)
    answers = [json.loads(line) for line in (tmp_path / "metrics" / "answers.jsonl").read_text().splitlines()]

    assert {(row["mode"], row["samples"][0], len(row["samples"])) for row in answers} == {("chat", "42", 3)}
    assert {row["format_ok"] for row in answers} == {None}


def test_size_and_speed_are_those_of_the_architecture(evaluation):
    rows = evaluation["metrics"]["models"].values()
    expected = sum(parameter.numel() for parameter in tiny_models.llama(0).parameters())

    assert {row["parameters"] for row in rows} == {expected}
    assert {row["kv_bytes_per_token"] for row in rows} == {3 * 2 * 2 * 32 * 2}  # layers, K and V, heads, size, bfloat16
    assert len({row["tokens_per_second"] for row in rows}) == 1
    for row in rows:
        low, high = row["tokens_per_second_interval"]
        assert 0 < low < row["tokens_per_second"] < high


def test_an_interrupted_evaluation_goes_on_with_the_models_that_are_left(evaluation, folders, problems, tmp_path):
    """Interrupted while the last model answers: the next run starts there, and does not measure speeds again."""
    context = quiet_context(tmp_path)
    calls: list[str] = []
    (tmp_path / "metrics").mkdir()
    context.stopping = lambda: "parent" in calls
    with pytest.MonkeyPatch.context() as patch:
        record_calls(patch, calls)
        patch.setattr("components.eval.stage.measure_step_ms", lambda folders, *_, **__: [[8.0]] * len(folders))
        with pytest.raises(Interrupted):
            run(CONFIG, context=context, out=tmp_path, problems=problems, **folders)
        context.stopping = lambda: False
        patch.setattr("components.eval.stage.measure_step_ms", None)
        run(CONFIG, context=context, out=tmp_path, problems=problems, **folders)

    assert calls == ["start", "rl", "parent", "start"]
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

    assert group_by_architecture(models) == [["sft", "rl", "parent"], ["child"]]
    assert group_by_architecture({**models, "rl": other_end}) == [["sft", "parent"], ["rl"], ["child"]]


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
    assert [num_samples(CONFIG, mode) for mode in ("on", "off", "chat", "plain")] == [3, 1, 3, 3]
    assert num_samples(CONFIG.model_copy(update={"temperature": 0.0}), "on") == 1


def test_without_a_model_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(InputError, match="no model to evaluate"):
        run(CONFIG, context=quiet_context(tmp_path), out=tmp_path, problems=tmp_path, sft=None)
