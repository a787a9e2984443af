"""Delivers a run to MLflow: an MLflow run for the pipeline, a nested one for each stage, data and models by digest.

A working stage sends its metrics itself (`live_metrics.py`); everything else is delivered from the store at the end of
the run, and so are the curves of stages whose metrics did not reach MLflow. What MLflow has is found by tags, so that a
second delivery, or one after a crash, adds only what is missing. Weights stay in the store: MLflow has digests and
addresses.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from components.core.base.flat_values import flatten, numbers
from components.core.lineage.champion import ALIAS, bundle_versions, champion
from components.core.lineage.curves import (
    curves_of_events,
    events_of_key,
    points_of_curves,
    stage_curves,
)
from components.core.lineage.mlflow_entities import (
    address,
    batches,
    dataset_inputs,
    kind_of,
    milliseconds,
    model_facts,
    params,
    summary_metrics,
)
from components.core.lineage.pipeline_runs import (
    COMMIT,
    METRICS_PER_REQUEST,
    PARAMS_PER_REQUEST,
    TAG,
    PipelineRuns,
    RunMetrics,
    last_attempt,
)
from components.core.lineage.tracking import MlflowUnavailable
from components.core.runtime.events import EventFile
from components.core.store.store import StageRecord, Store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "killed": "KILLED"}
DELIVERED = f"{TAG}cached"
"""Tag that is set last: the MLflow run of a stage has everything."""
MEASURED = ("accuracy", "format", "perplexity", "tokens_per_second", "parameters", "kv_bytes_per_token", "tasks")


class Pipeline:
    """The delivery of one run."""

    def __init__(
        self, client: "MlflowClient", store: Store, record: dict[str, Any], tracking_uri: str, until: float
    ) -> None:
        self.client, self.store, self.record, self.run = client, store, record, record["run"]
        self.summary: dict[str, Any] = store.document(f"runs/{self.run}/summary.json") or {}
        self.evaluated = {**self.summary.get("models", {}), **self.summary.get("baselines", {})}
        self.tracking_uri, self.until = tracking_uri, until
        self.runs = self._find_runs()
        roles = {model["digest"]: role for role, model in reversed(self.evaluated.items())}
        self.models = _Models(client, store, self.runs.experiment_id, roles)
        self.versions: dict[tuple[str, str], str] = {}
        """Version of a registered model, by its name and the bundle's digest."""

    def deliver(self) -> None:
        """Deliver the stages in the order in which they ended, then the run itself and how it ended."""
        paths = self.store.documents(f"runs/{self.run}/stages/")
        documents = [found for path in paths if (found := self.store.read_document_or_none(path)) is not None]
        records: list[StageRecord] = []
        for document in sorted(documents, key=lambda document: document["finished"]):
            record = self.store.stage_record(document["key"])
            if record is None:
                continue
            records.append(record)
            found = self.runs.stages.get((document["label"], document["key"]))
            if found is None or found.info.status != "FINISHED" or DELIVERED not in found.data.tags:
                self._check_time(len(records) - 1, len(documents))
                self._deliver_stage(document, record)
        run = self.runs.pipeline
        self.client.log_inputs(run.info.run_id, datasets=dataset_inputs(self.store, self._data(records)))
        ended = self.record["finished"] or self.record["started"]
        for batch in batches(summary_metrics(self.summary, milliseconds(ended)), METRICS_PER_REQUEST):
            self.client.log_batch(run.info.run_id, metrics=batch)
        if status := STATUS.get(self.record["status"]):
            finished = {(document["label"], document["key"]) for document in documents}
            self._end_unfinished_stages(finished, "KILLED" if status == "FINISHED" else status, ended)
            self.runs.end(run, status, ended)

    def remove_duplicates(self) -> None:
        """Remove what was created twice: by a request that MLflow carried out late, and by the one that repeated it."""
        runs = self._find_runs()
        for run in runs.stages.values():
            if run.data.tags["mlflow.parentRunId"] != runs.pipeline.info.run_id:  # created below a duplicate
                self.client.set_tag(run.info.run_id, "mlflow.parentRunId", runs.pipeline.info.run_id)
        for run in runs.duplicates:
            self.client.delete_run(run.info.run_id)
        self.models.remove_duplicates()
        for (name, digest), used in self.versions.items():
            for version in bundle_versions(self.client, name, digest):
                if version.version != used:
                    self.client.delete_model_version(name, version.version)

    def _find_runs(self) -> PipelineRuns:
        return PipelineRuns(self.client, self.store, self.record, self.tracking_uri)

    def _check_time(self, num_delivered: int, num_stages: int) -> None:
        """Stop where MLflow is slow; the next delivery continues."""
        if time.monotonic() >= self.until:
            raise MlflowUnavailable(
                f"MLflow is slow: it has {num_delivered} of the {num_stages} stages of run {self.run}",
                hint="the next run or `tessera ui` delivers the rest",
            )

    def _end_unfinished_stages(self, finished: set[tuple[str, str]], status: str, ended: float) -> None:
        """Record attempts that failed or were stopped; `status` is that of stages that could not report their end."""
        for path in sorted((self.store.local / "runs" / self.run).glob("*.jsonl")):
            events = list(EventFile(path).read())
            attempt = last_attempt(events)
            if attempt is None or attempt.status == "FINISHED" or (attempt.label, attempt.key) in finished:
                continue
            run = self.runs.stage(attempt.stage, attempt.label, attempt.key, attempt.started)
            curves = curves_of_events(events_of_key(events, attempt.key))
            RunMetrics(self.client, run).log(list(points_of_curves(curves)))
            reported = status if attempt.status == "RUNNING" else attempt.status
            self.runs.end(run, reported, attempt.ended or ended, attempt.error)
            finished.add((attempt.label, attempt.key))
        for role, run in self.runs.stages.items():
            if role not in finished and run.info.status == "RUNNING":  # its events are on another machine
                self.runs.end(run, status, ended)

    def _kind(self, digest: str) -> str | None:
        return kind_of(self.store, digest)

    def _data(self, records: Sequence[StageRecord]) -> list[tuple[str, str]]:
        """Name and digest of all data that the pipeline read or made, so that pipelines compare by them."""
        made = {name: digest for record in records for name, digest in record.outputs.items()}
        return [
            (name, digest)
            for name, digest in {**made, **self.record["sources"]}.items()
            if self._kind(digest) == "data"
        ]

    def _deliver_stage(self, document: Mapping[str, Any], record: StageRecord) -> None:
        """Deliver one stage: settings, metrics, inputs and outputs; then mark it as ended, and as delivered."""
        found = self.runs.stage(record.stage, document["label"], record.key, document["started"])
        run = self.client.get_run(found.info.run_id)  # a search leaves out the models that went in
        run_id = run.info.run_id
        at = milliseconds(document["finished"])
        for batch in batches(params(record.config), PARAMS_PER_REQUEST):
            self.client.log_batch(run_id, params=batch)
        self._log_metrics(run, document, record, at)
        self._log_inputs(run, record)
        self._log_outputs(run, record)
        if record.stage == "eval":
            self._log_evaluation(run_id, record, at)
        if record.stage == "deploy":
            self._register(run_id, record)
        if run.info.status != "FINISHED":
            self.runs.reopen(run)  # without the error of an earlier attempt
        self.runs.end(run, "FINISHED", document["finished"])
        self._tag_as_delivered(run_id, document, record)

    def _tag_as_delivered(self, run_id: str, document: Mapping[str, Any], record: StageRecord) -> None:
        from mlflow.entities import RunTag

        tags = {f"{TAG}output.{name}": address(self.store, digest) for name, digest in record.outputs.items()}
        tags |= {f"{TAG}code-digest": record.code, DELIVERED: str(document["cached"]).lower()}
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _log_metrics(self, run: "Run", document: Mapping[str, Any], record: StageRecord, at: int) -> None:
        """Curves and final numbers; of a cached stage too, so that any two runs can be compared."""
        from mlflow.entities import Metric

        final = {**numbers(record.result), "seconds": record.seconds, "seconds_in_this_run": document["seconds"]}
        metrics = [Metric(f"result/{name}", value, at, 0) for name, value in final.items()]
        for batch in batches(metrics, METRICS_PER_REQUEST):
            self.client.log_batch(run.info.run_id, metrics=batch)
        RunMetrics(self.client, run).log(list(points_of_curves(stage_curves(self.store, record.key))))

    def _log_inputs(self, run: "Run", record: StageRecord) -> None:
        """Log data by digest, and the entries of models that are not logged yet: MLflow refuses to log one twice."""
        from mlflow.entities import LoggedModelInput

        inputs = list(_each(record.inputs))
        kinds = {digest: self._kind(digest) for _, digest in inputs}
        data = [(name, digest) for name, digest in inputs if kinds[digest] != "model"]
        models = {self.models.entry(digest) for _, digest in inputs if kinds[digest] == "model"}
        logged = {model.model_id for model in run.inputs.model_inputs} if run.inputs else set()
        entries = [LoggedModelInput(model_id) for model_id in sorted(models - logged)]
        self.client.log_inputs(run.info.run_id, datasets=dataset_inputs(self.store, data), models=entries)

    def _log_outputs(self, run: "Run", record: StageRecord) -> None:
        """Log the models that the stage made, each with the models it was made from."""
        from mlflow.entities import LoggedModelOutput

        made = {name: digest for name, digest in record.outputs.items() if self._kind(digest) == "model"}
        models = {
            self.models.entry(digest, name=name, run_id=run.info.run_id, record=record) for name, digest in made.items()
        }
        logged = {model.model_id for model in run.outputs.model_outputs} if run.outputs else set()
        if new := sorted(models - logged):
            self.client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step=0) for model_id in new])

    def _log_evaluation(self, run_id: str, record: StageRecord, at: int) -> None:
        """Log the measurements of each model, with the model and the problems; each model is a step of the curve."""
        from mlflow.entities import Metric

        problems = record.inputs.get("problems")
        data = {"dataset_name": "problems", "dataset_digest": str(problems)[:36]} if problems else {}
        metrics = [
            Metric(name, value, at, place, model_id=self.models.entry(model["digest"]), **data)
            for place, model in enumerate(self.evaluated.values())
            for name, value in numbers({key: model[key] for key in MEASURED}).items()
        ]
        for batch in batches(metrics, METRICS_PER_REQUEST):
            self.client.log_batch(run_id, metrics=batch)

    def _register(self, run_id: str, record: StageRecord) -> None:
        """Register a version of the model for the deployed bundle, under its alias; the champion's alias follows it."""
        from mlflow.exceptions import MlflowException

        name, digest = record.result.get("registered_model"), record.outputs.get("bundle")
        if not isinstance(name, str) or digest is None:
            return
        with contextlib.suppress(MlflowException):  # it exists
            self.client.create_registered_model(name)
        same = bundle_versions(self.client, name, digest)
        version = same[0] if same else self._create_version(name, digest, run_id, record)
        self.versions[name, digest] = version.version
        alias = record.result.get("alias")
        if isinstance(alias, str):
            self.client.set_registered_model_alias(name, alias, version.version)
        if champion(self.store, name) == digest:
            self.client.set_registered_model_alias(name, ALIAS, version.version)

    def _create_version(self, name: str, digest: str, run_id: str, record: StageRecord) -> Any:
        model_id = self.models.entry(digest)
        tags = {f"{TAG}digest": digest, f"{TAG}address": address(self.store, digest), f"{TAG}run": self.run}
        tags |= {name: value for name, value in self.runs.tags().items() if name in (f"{TAG}recipe-digest", COMMIT)}
        tags |= {f"{TAG}{key}": str(value) for key, value in flatten({"gate": record.result.get("gate")}).items()}
        return self.client.create_model_version(
            name, f"models:/{model_id}", run_id=run_id, model_id=model_id, tags=tags
        )


class _Models:
    """MLflow's entries of models: one for each digest in an experiment, whichever runs made it."""

    def __init__(self, client: "MlflowClient", store: Store, experiment_id: str, roles: Mapping[str, str]) -> None:
        self._client, self._store, self._experiment_id, self._roles = client, store, experiment_id, roles
        self._ids: dict[str, str] = {}

    def entry(
        self, digest: str, *, name: str = "given", run_id: str | None = None, record: StageRecord | None = None
    ) -> str:
        """The id of a model's entry, created where MLflow has none.

        Args:
            digest: the model.
            name: its name where it has no role in the run.
            run_id: the run that made it; None for a source of the user.
            record: the stage that made it.
        """
        if digest not in self._ids:
            found = self._find(digest)
            self._ids[digest] = found[0].model_id if found else self._create(digest, name, run_id, record)
            if not found or found[0].status != "READY":
                self._client.finalize_logged_model(self._ids[digest], "READY")
        return self._ids[digest]

    def remove_duplicates(self) -> None:
        """Remove further entries of models that were looked up."""
        for digest, used in self._ids.items():
            for model in self._find(digest):
                if model.model_id != used:
                    self._client.delete_logged_model(model.model_id)

    def _find(self, digest: str) -> Sequence[Any]:
        """Entries of a model, by its digest."""
        return self._client.search_logged_models(
            [self._experiment_id], filter_string=f"tags.`{TAG}digest` = '{digest}'"
        )

    def _create(self, digest: str, name: str, run_id: str | None, record: StageRecord | None) -> str:
        tags = {f"{TAG}digest": digest, f"{TAG}address": address(self._store, digest)}
        if record is not None:
            tags |= {f"{TAG}stage-key": record.key, f"{TAG}stage": record.stage, f"{TAG}code-digest": record.code}
            parents = [(f"{TAG}made-from.{name}", parent) for name, parent in _each(record.inputs)]
            tags |= {name: parent for name, parent in parents if kind_of(self._store, parent) == "model"}
        model = self._client.create_logged_model(
            self._experiment_id,
            name=self._roles.get(digest, name),
            source_run_id=run_id,
            tags=tags,
            params=model_facts(self._store, digest),
            model_type="causal-lm",
        )
        return str(model.model_id)


def _each(inputs: Mapping[str, str | list[str]]) -> Iterator[tuple[str, str]]:
    """Name and digest of each input, those of a list numbered."""
    for name, value in inputs.items():
        if isinstance(value, list):
            yield from ((f"{name}-{number}", digest) for number, digest in enumerate(value))
        else:
            yield name, value
