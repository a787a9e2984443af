"""The whole evaluation with real servers, of models whose answers are known."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from components.core.chat import END_THINK, parse_answer, plain_answer
from components.core.errors import InputError
from components.core.job import silent_job
from components.core.vllm_server import Server
from components.core.workload import Workload
from components.eval.asking import num_samples
from components.eval.config import EvalConfig
from components.eval.stage import run
from components.eval.statistics import interval
from tests.components.conftest import write_rows
from tests.components.core import tiny_models

CONFIG = EvalConfig(
    num_problems=3,
    num_samples=3,
    max_tokens=8,
    temperature=0.1,  # of such sure models as good as greedy
    workload=Workload(batch_size=2, prompt_tokens=4, new_tokens=8, rounds=1),
    seed=1,
)
EXPECTED = {"standard": ["42", "13", "42", "42"], "hard": ["13", "42"]}
"""Right answers of the problems; the fourth is one too many."""


def watch(patch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Note every start of a server, and every model whose weights it is given."""
    start, swap = Server.start, Server.swap_weights

    def noted_start(server: Server) -> None:
        calls.append("start")
        start(server)

    def noted_swap(server: Server, folder: Path, version: str) -> None:
        calls.append(version)
        swap(server, folder, version)

    patch.setattr(Server, "start", noted_start)
    patch.setattr(Server, "swap_weights", noted_swap)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One evaluation: its metrics, its answers, and how often a server was started and given other weights."""
    folder = tmp_path_factory.mktemp("eval")
    for split, answers in EXPECTED.items():
        rows = (
            {"id": f"{split}-{i}", "question": "6*7=", "prompt": "6*7=", "answer": a} for i, a in enumerate(answers)
        )
        write_rows(folder / f"test-{split}.jsonl", rows)
    thinking = ["<on>", "<think>", "6", "*", "7", "</think>"]
    sft = tiny_models.speaker([*thinking, "4"], ["<off>", "4", "2", "<eos>"])
    rl = tiny_models.speaker([*thinking, "1"], ["<off>", "1", "3", "<eos>"])
    parent = tiny_models.speaker(["=", "4", "2", "<eos>"])
    models = {"parent": parent, "sft": sft, "rl": rl}
    folders: dict[str, Path | None] = {name: tiny_models.write(model, folder / name) for name, model in models.items()}
    (folder / "out" / "metrics").mkdir(parents=True)
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, calls)
        result = run(CONFIG, job=silent_job(folder / "job"), out=folder / "out", problems=folder, **folders)
    lines = (folder / "out" / "metrics" / "answers.jsonl").read_text().splitlines()
    return {
        "result": result,
        "metrics": json.loads((folder / "out" / "metrics" / "metrics.json").read_text()),
        "answers": [json.loads(line) for line in lines],
        "calls": calls,
        "folder": folder,
        "folders": folders,
    }


def test_models_of_one_architecture_share_a_server(made):
    assert made["calls"] == ["start", "parent", "sft", "rl"]


def test_accuracies_are_those_of_models_that_always_say_the_same(made):
    models = made["metrics"]["models"]

    assert list(models) == ["parent", "sft", "rl"]
    assert models["sft"]["accuracy"] == {"standard": {"on": 2 / 3, "off": 2 / 3}, "hard": {"on": 0.5, "off": 0.5}}
    assert models["rl"]["accuracy"] == {"standard": {"on": 1 / 3, "off": 1 / 3}, "hard": {"on": 0.5, "off": 0.5}}
    assert models["sft"]["format"] == models["rl"]["format"] == {"on": 1.0, "off": 1.0}
    assert models["parent"]["accuracy"]["standard"] == {"on": 2 / 3, "off": None}
    assert models["parent"]["format"] == {"on": None, "off": None}
    assert made["result"] == {"models": {name: row["accuracy"] for name, row in models.items()}}
    assert made["metrics"]["settings"] == CONFIG.canonical()


def test_every_problem_was_asked_in_every_way_as_often_as_set(made):
    asked = [(row["model"], row["split"], row["mode"], row["id"], len(row["texts"])) for row in made["answers"]]
    ways = [("parent", "plain", 1), *((role, mode, n) for role in ("sft", "rl") for mode, n in (("on", 3), ("off", 1)))]
    ids = [("standard", f"standard-{i}") for i in range(3)] + [("hard", f"hard-{i}") for i in range(2)]

    assert sorted(asked) == sorted((role, split, way, name, n) for role, way, n in ways for split, name in ids)
    assert {(row["model"], row["mode"]): set(row["texts"]) for row in made["answers"]} == {
        ("parent", "plain"): {"42"},
        ("sft", "on"): {"<think>6*7</think>42"},
        ("sft", "off"): {"42"},
        ("rl", "on"): {"<think>6*7</think>13"},
        ("rl", "off"): {"13"},
    }


def test_a_recount_from_the_answers_gives_the_metrics(made):
    """By text alone, without what the stage itself has noted beside each answer."""
    for name, row in made["metrics"]["models"].items():
        for split in EXPECTED:
            for mode in ("on", "off"):
                way = "plain" if name == "parent" and mode == "on" else mode
                found = [a for a in made["answers"] if (a["model"], a["split"], a["mode"]) == (name, split, way)]
                if not found:
                    assert row["accuracy"][split][mode] is None
                    continue
                said = [[plain_answer(t) if way == "plain" else parse_answer(t)[1] for t in a["texts"]] for a in found]
                right = [[text == a["expected"] for text in texts] for a, texts in zip(found, said, strict=True)]
                share = sum(sum(each) / len(each) for each in right) / len(right)
                assert row["accuracy"][split][mode] == pytest.approx(share)
                assert row["interval"][split][mode] == pytest.approx(interval(right))
                if way != "plain":
                    kept = [(END_THINK in text) == (mode == "on") for a in found for text in a["texts"]]
                    assert all(kept) == (row["format"][mode] == 1.0)


def test_size_and_speed_are_those_of_the_architecture(made):
    rows = made["metrics"]["models"].values()
    expected = sum(parameter.numel() for parameter in tiny_models.llama(0).parameters())

    assert {row["parameters"] for row in rows} == {expected}
    assert {row["kv_bytes_per_token"] for row in rows} == {3 * 2 * 2 * 32 * 2}  # layers, K and V, heads, size, bfloat16
    assert len({row["tokens_per_second"] for row in rows}) == 1
    assert min(row["tokens_per_second"] for row in rows) > 0


def test_models_that_were_asked_before_an_interruption_are_not_asked_again(made, tmp_path, monkeypatch):
    """With every answer saved no server is started at all."""
    monkeypatch.setattr("components.eval.stage.Launcher", None)
    monkeypatch.setattr(
        "components.eval.stage.measure_step_ms", lambda folders, workload, threads: [[1.0]] * len(folders)
    )
    (tmp_path / "metrics").mkdir()
    job = silent_job(made["folder"] / "job")
    run(CONFIG, job=job, out=tmp_path, problems=made["folder"], **made["folders"])

    lines = (tmp_path / "metrics" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == made["answers"]


def test_greedy_answers_are_given_once():
    assert [num_samples(CONFIG, way) for way in ("on", "off", "plain")] == [3, 1, 1]
    assert num_samples(CONFIG.model_copy(update={"temperature": 0.0}), "on") == 1


def test_without_a_model_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(InputError, match="no model to evaluate"):
        run(CONFIG, job=silent_job(tmp_path), out=tmp_path, problems=tmp_path, sft=None)
