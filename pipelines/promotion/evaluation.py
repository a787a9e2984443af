"""What the store has recorded about a bundle: the evaluation of its model, the run that made it, its ancestry."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.core.base.errors import InputError, StoreError
from components.core.store.store import StageRecord, Store
from components.deploy.gate import evaluated_role
from components.eval.answer_rows import AnswerRow, parse_answers
from pipelines.records.runs import artifacts, run_record, run_records

SAME_ANSWERS = ("temperature", "top_p", "max_tokens")
"""Settings of an evaluation that change answers; comparable evaluations agree in them."""


@dataclass(frozen=True)
class Evaluation:
    """A bundle with what was measured of its model.

    Attributes:
        bundle: digest of the bundle.
        run: name of the run that made it.
        recipe: digest of the recipe of that run.
        deploy: record of the stage that made the bundle.
        record: record of the evaluation; None where there was none.
        measured: numbers of the model as in `metrics.json`.
        answers: its answers.
        tokenizer: digest of its tokenizer file; None without one.
        ancestors: digests of the run's parent and data sets by role.
    """

    bundle: str
    run: str
    recipe: str
    deploy: StageRecord
    record: StageRecord | None
    measured: Mapping[str, Any]
    answers: Sequence[AnswerRow]
    tokenizer: str | None
    ancestors: Mapping[str, str]

    def settings(self, *names: str) -> dict[str, Any]:
        """Some settings of the evaluation."""
        return {} if self.record is None else {name: self.record.config.get(name) for name in names}


def evaluation_of_run(store: Store, run: str) -> Evaluation:
    """The bundle of a run and its evaluation.

    Raises:
        InputError: the run has no bundle.
        StoreError: its artifacts are gone.
    """
    found = _read(store, run)
    if found is None:
        raise InputError(
            f"run {run!r} has made no bundle, so there is nothing to promote",
            hint="give the recipe a section `deploy:`, or wait for the end of the run",
        )
    return found


def find_evaluation(store: Store, bundle: str) -> Evaluation | None:
    """The newest evaluation of a bundle by its digest; None where the store does not have it any more."""
    for record in reversed(run_records(store)):
        deploy = _stage(store, record["run"], "deploy")
        if deploy is not None and deploy.outputs.get("bundle") == bundle:
            try:
                return _read(store, record["run"])
            except StoreError:
                continue
    return None


def _read(store: Store, run: str) -> Evaluation | None:
    deploy, record = _stage(store, run, "deploy"), _stage(store, run, "eval")
    if deploy is None or "bundle" not in deploy.outputs:
        return None
    bundle = deploy.outputs["bundle"]
    measured: Mapping[str, Any] = {}
    answers: list[AnswerRow] = []
    if record is not None:
        metrics = record.outputs["metrics"]
        models = json.loads(store.read(metrics, "metrics.json"))["models"]
        role = evaluated_role(models, str(deploy.config.get("role")))
        measured = models[role]
        if "answers.jsonl" in store.manifest(metrics).files:
            answers = [row for row in parse_answers(store.read(metrics, "answers.jsonl")) if row.model == role]
    tokenizer = store.manifest(bundle).files.get("tokenizer.json")
    return Evaluation(
        bundle=bundle,
        run=run,
        recipe=str(run_record(store, run)["recipe_digest"]),
        deploy=deploy,
        record=record,
        measured=measured,
        answers=answers,
        tokenizer=None if tokenizer is None else tokenizer.sha256,
        ancestors=_ancestors(store, run),
    )


def _stage(store: Store, run: str, label: str) -> StageRecord | None:
    """Record of a finished stage of a run."""
    document = store.read_document_or_none(f"runs/{run}/stages/{label}.json")
    return None if document is None else store.stage_record(document["key"])


def _ancestors(store: Store, run: str) -> dict[str, str]:
    """The parent and the data sets of a run, and what its user gave it."""
    made = artifacts(store, run)
    read: dict[str, str] = {
        f"given {name}": digest for name, digest in run_record(store, run)["sources"].items() if digest
    }
    for role, digest in made.items():
        if role == "parent" or store.manifest(digest).kind == "data":
            read[role] = digest
    return read
