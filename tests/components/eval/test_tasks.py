"""Tasks of lm-eval on real servers: a task file of the test's own, with data beside it and nothing of any network."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import DataError, InputError, MissingPackage, StageFailed, TesseraError
from components.core.runtime.context import quiet_context
from components.core.runtime.resume import Resume
from components.eval.answers import EvalCheckpoint, TaskResults
from components.eval.config import EvalConfig, HeldOutText
from components.eval.stage import run
from components.eval.tasks import _failure
from tests.components.conftest import write_rows
from tests.components.core import tiny_models

QUESTIONS = ("6*7=", "6*7=", "6*7=")
ANSWERS = ("42", "13", "42")
TEXTS = ("the cat sat", "a dog and a hen", "6*7=42")
SUMS = """
task: own_sums
dataset_path: json
dataset_kwargs: {data_files: {test: data/sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["#"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.5}
"""
TEXT = """
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: data/text.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{first}}"
doc_to_target: "{{rest}}<eos>"
target_delimiter: ""
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
metadata: {version: 2.0}
"""


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data").mkdir()
    (folder / "sums.yaml").write_text(SUMS)
    (folder / "text.yaml").write_text(TEXT)
    rows = ({"question": question, "answer": answer} for question, answer in zip(QUESTIONS, ANSWERS, strict=True))
    write_rows(folder / "data" / "sums.jsonl", rows)
    write_rows(folder / "data" / "text.jsonl", ({"first": text[0], "rest": text[1:]} for text in TEXTS))
    return folder


@pytest.fixture(scope="module")
def evaluation(task_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Metrics and samples of a base model with random weights, and of a model that always says the same."""
    pytest.importorskip("vllm")
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("eval")
    thinking = ["<on>", "<think>", "6", "*", "7", "</think>", "1", "3", "<eos>"]
    models = {
        "parent": tiny_models.write(tiny_models.llama(3), folder / "parent"),
        "sft": tiny_models.write(tiny_models.speaker(thinking, ["<off>", "4", "2", "<eos>"]), folder / "sft"),
    }
    (models["parent"] / "chat_template.jinja").unlink()
    corpus = folder / "corpus"
    corpus.mkdir()
    write_rows(corpus / "validation.jsonl", ({"text": text} for text in TEXTS))
    config = EvalConfig(
        tasks=("own_sums", "own_text"),
        max_tokens=8,
        held_out=HeldOutText(seq_len=64, batch_size=1, num_batches=1),
        seed=1,
    )
    (folder / "metrics").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("components.eval.stage.measure_step_ms", lambda folders, *_, **__: [[8.0]] * len(folders))
        result = run(
            config, context=quiet_context(folder / "job"), out=folder, corpus=corpus, task_files=task_files, **models
        )
    samples = (folder / "metrics" / "task_samples.jsonl").read_text().splitlines()
    metrics = json.loads((folder / "metrics" / "metrics.json").read_text())
    return {"result": result, "metrics": metrics, "samples": [json.loads(line) for line in samples]}


def test_a_task_of_the_users_is_scored_in_every_mode_of_a_model(evaluation: dict[str, Any]) -> None:
    models = evaluation["metrics"]["models"]
    sums = models["sft"]["tasks"]["own_sums"]
    assert {mode: found["metrics"] for mode, found in sums.items()} == {
        "on": {"exact_match": pytest.approx(1 / 3)},
        "off": {"exact_match": pytest.approx(2 / 3)},
    }
    assert {(found["problems"], found["version"]) for found in sums.values()} == {(3, "1.5")}
    assert models["parent"]["tasks"]["own_sums"].keys() == {"plain"}
    assert models["sft"]["tasks"]["own_text"].keys() == {"plain"}
    assert evaluation["metrics"]["lm_eval"]
    assert evaluation["result"]["tasks"] == {name: row["tasks"] for name, row in models.items()}


def test_every_problem_of_a_task_is_recorded_with_its_answer(evaluation: dict[str, Any]) -> None:
    said = {
        (row["mode"], row["doc"]["answer"]): (row["resps"], row["exact_match"])
        for row in evaluation["samples"]
        if (row["model"], row["task"]) == ("sft", "own_sums")
    }
    assert said == {
        ("on", "42"): ([["13"]], 0.0),
        ("on", "13"): ([["13"]], 1.0),
        ("off", "42"): ([["42"]], 1.0),
        ("off", "13"): ([["42"]], 0.0),
    }


def test_perplexity_through_lm_eval_is_ours(evaluation: dict[str, Any]) -> None:
    """Of the same tokens: all but the first of each text, and the end of the text."""
    for model, row in evaluation["metrics"]["models"].items():
        found = [one for one in evaluation["samples"] if (one["model"], one["task"]) == (model, "own_text")]
        assert len(found) == len(TEXTS)
        loss = -sum(float(one["resps"][0][0][0]) for one in found) / sum(map(len, TEXTS))
        assert loss == pytest.approx(row["held_out_loss"], rel=1e-3)
        assert math.exp(loss) == pytest.approx(row["perplexity"], rel=5e-3)


def test_an_evaluation_with_tasks_names_the_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.eval.tasks.find_spec", lambda name: None)
    model = tiny_models.write(tiny_models.llama(0), tmp_path / "model")
    with pytest.raises(MissingPackage, match=r"eval.tasks needs lm-eval.*\n.*tessera\[tasks\]"):
        run(EvalConfig(tasks=("gsm8k",)), context=quiet_context(tmp_path), out=tmp_path, parent=model)


@pytest.mark.parametrize(
    ("last", "raised", "message"),
    [
        ("KeyError: \"Spec 'gsm' is not a registered task/group/tag name\"", InputError, "Spec 'gsm' is not"),
        ("ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)", DataError, "of gsm8k is"),
        ("ZeroDivisionError: division by zero", StageFailed, "could not run gsm8k:"),
    ],
)
def test_what_is_wrong_with_a_task_is_said_in_words(last: str, raised: type[TesseraError], message: str) -> None:
    error = _failure(f"Traceback\n{last}\n", ["gsm8k"])
    assert type(error) is raised
    assert message in error.message


def test_results_of_tasks_are_in_the_checkpoint(tmp_path: Path) -> None:
    resume = Resume(tmp_path)
    found = TaskResults({"gsm8k": {"on": {"metrics": {"exact_match": 0.5}}}}, [{"task": "gsm8k", "doc": {"é": 1}}])
    saved = EvalCheckpoint(speeds={"sft": {"tokens_per_second": 1.0}}, tasks={"sft": found})
    saved.save(resume)
    assert EvalCheckpoint.latest(resume) == saved
