"""A run with an evaluated bundle in a store, without any work: records and small artifacts are made up."""

import json
import random
from typing import Any

from components.core.base.config import digest_of
from components.core.store.store import StageRecord, Store, key_of
from components.deploy.config import DeployConfig
from components.eval.answer_rows import AnswerRow, PromptMode
from components.eval.config import EvalConfig
from pipelines.recipe.schema import Recipe
from pipelines.records.runs import begin_run, end_run
from tests.pipelines.made_up_run import put

PROBLEMS = 400


def answers(accuracy_on: float, accuracy_off: float = 0.4, *, form: float = 1.0, seed: int = 0) -> list[AnswerRow]:
    """Answers of a model with exactly these fractions of correct answers; which problems it solves is drawn."""

    def rows(mode: PromptMode, accuracy: float) -> list[AnswerRow]:
        order = random.Random(f"{seed} {mode}").sample(range(PROBLEMS), PROBLEMS)
        return [
            AnswerRow(
                model="rl",
                split="standard",
                mode=mode,
                id=f"p{number}",
                question=f"{number}+1=",
                expected=str(number + 1),
                samples=("x",),
                correct=(order[number] < accuracy * PROBLEMS,),
                format_ok=(order[number] < form * PROBLEMS,),
            )
            for number in range(PROBLEMS)
        ]

    return rows("on", accuracy_on) + rows("off", accuracy_off)


def record_run(store: Store, run: str, rows: list[AnswerRow], **changes: Any) -> str:
    """Write a run that has ended, with its evaluation and its bundle; returns the bundle's digest.

    Args:
        store: takes it.
        run: its name.
        rows: answers of its model.
        changes: see `record_stages`.
    """
    begin_run(store, Recipe(name="nano", seed=1), {}, run)
    bundle = record_stages(store, run, rows, **changes)
    end_run(store, run, "succeeded")
    return bundle


def record_stages(
    store: Store,
    run: str,
    rows: list[AnswerRow],
    *,
    weights: str | None = None,
    corpus: str = "corpus",
    device: str = "cpu A",
    perplexity: float = 2.0,
    speed: float = 1000.0,
    speed_interval: list[float] | None = None,
    settings: dict[str, Any] | None = None,
    gate: bool = True,
) -> str:
    """Write the stages `eval` and `deploy` of a run; returns the bundle's digest."""
    measured: dict[str, Any] = {"perplexity": perplexity, "tokens_per_second": speed}
    if speed_interval is not None:
        measured["tokens_per_second_interval"] = speed_interval
    files = {
        "metrics.json": json.dumps({"models": {"sft": {}, "rl": measured}}),
        "answers.jsonl": "".join(row.model_dump_json() + "\n" for row in rows),
    }
    config = EvalConfig.parse(settings or {}).canonical()
    metrics = _record(
        store, run, "eval", config, {"corpus": digest_of(corpus)}, {"metrics": put(store, files, "table")}, device
    )
    weights = weights or digest_of([files, run])
    bundle = put(store, {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": weights}, "model")
    threshold = {"check": "min_accuracy", "threshold": 0.9, "value": 0.5, "interval": None, "passed": gate}
    result = {"gate": {"passed": gate, "checks": [threshold]}, "alias": "candidate", "registered_model": "nano"}
    deploy = DeployConfig(name="nano").canonical()
    _record(store, run, "deploy", deploy, {"metrics": metrics["metrics"]}, {"bundle": bundle}, result=result)
    return bundle


def _record(
    store: Store,
    run: str,
    stage: str,
    config: dict[str, Any],
    inputs: dict[str, str],
    outputs: dict[str, str],
    device: str | None = None,
    result: dict[str, Any] | None = None,
) -> dict[str, str]:
    """A finished stage of the run."""
    computed: dict[str, Any] = {"stage": stage, "config": config, "code": digest_of(outputs), "inputs": inputs}
    computed |= {"libraries": {}, "device": device}
    record = StageRecord(key=key_of(**computed), **computed, outputs=outputs, result=result or {})
    store.put_stage_record(record)
    document = {"label": stage, "stage": stage, "key": record.key, "cached": False, "seconds": 1.0, "started": 1.0}
    store.put_document(f"runs/{run}/stages/{stage}.json", document | {"finished": 2.0})
    return outputs
