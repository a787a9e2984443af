"""What runs did, told to MLflow: a run a pipeline, a nested run a stage, data and models by digest, the registry.

Stages never talk to MLflow. They leave records and curves in the store, and `replay.py` has them told afterwards.
What is there already is recognised by tags, so that a second delivery, or one after a crash, adds what is missing and
nothing else. Weights stay in the store: MLflow holds digests and addresses.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from components.core.base.config import digest_of
from components.core.base.errors import TesseraError
from components.core.lineage.curves import stage_curves
from components.core.lineage.mlflow_entities import (
    address,
    batches,
    dataset_inputs,
    flatten,
    kind_of,
    milliseconds,
    model_facts,
    numbers,
    summary_metrics,
)
from components.core.store.store import StageRecord, Store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

TAG = "tessera.dev/"
COMMIT = "mlflow.source.git.commit"
STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "killed": "KILLED"}


class LineageError(TesseraError):
    """MLflow does not take records; they stay in the store until it does."""


class MlflowAway(LineageError):
    """MLflow does not answer, or not sensibly, or too slowly; it may later."""


class Pipeline:
    """The delivery of one run."""

    def __init__(
        self, client: "MlflowClient", store: Store, record: dict[str, Any], tracking_uri: str, until: float
    ) -> None:
        self.client, self.store, self.record, self.run = client, store, record, record["run"]
        self.summary: dict[str, Any] = store.document(f"runs/{self.run}/summary.json") or {}
        self.evaluated = {**self.summary.get("models", {}), **self.summary.get("baselines", {})}
        self.experiment_id = self._experiment(tracking_uri)
        self.models = _Models(client, store, self.experiment_id, self._roles())
        self.run_id, self.until = "", until
        self.versions: dict[tuple[str, str], str] = {}
        """Version of a registered model, by its name and the bundle's digest."""

    def deliver(self) -> None:
        """The run, then its stages in the order in which they ended, then how it ended."""
        parent = self._parent_run()
        self.run_id = parent.info.run_id
        known = self._stage_runs()
        paths = self.store.documents(f"runs/{self.run}/stages/")
        documents = [found for path in paths if (found := self.store.read_document_or_none(path)) is not None]
        records: list[StageRecord] = []
        for document in sorted(documents, key=lambda document: document["finished"]):
            record = self.store.stage_record(document["key"])
            if record is None:
                continue
            records.append(record)
            found = known.get((document["label"], document["key"]))
            if found is None or found.info.status != "FINISHED":
                self._check_time(len(records) - 1, len(documents))
                self._deliver_stage(document, record, found)
        self.client.log_inputs(self.run_id, datasets=dataset_inputs(self.store, self._data(records)))
        at = milliseconds(self.record["finished"] or self.record["started"])
        for batch in batches(summary_metrics(self.summary, at), 1000):
            self.client.log_batch(self.run_id, metrics=batch)
        if status := STATUS.get(self.record["status"]):
            self.client.set_terminated(self.run_id, status, at)

    def remove_doubles(self) -> None:
        """Remove what was made twice: by a request that MLflow answered too late, and by the one that repeated it."""
        mine = f"tags.`{TAG}identity` = '{self._tags()[f'{TAG}identity']}'"
        kept = {self.run_id} | {run.info.run_id for run in self._stage_runs().values()}
        for run in self._search(mine):
            if run.info.run_id not in kept:
                self.client.delete_run(run.info.run_id)
        self.models.remove_doubles()
        for (name, digest), kept_version in self.versions.items():
            for version in self._versions(name, digest):
                if version.version != kept_version:
                    self.client.delete_model_version(name, version.version)

    def _check_time(self, num_told: int, num_stages: int) -> None:
        """Leave the rest for the next time where MLflow is slow."""
        if time.monotonic() >= self.until:
            raise MlflowAway(
                f"MLflow is slow: it was told of {num_told} of the {num_stages} stages of run {self.run}",
                hint="the next run or `tessera ui` delivers the rest",
            )

    def _experiment(self, tracking_uri: str) -> str:
        """The experiment of the recipe, made where it is not there."""
        from mlflow.exceptions import MlflowException

        name = self.record["recipe_name"]
        where = (
            (self.store.local / "mlflow-artifacts").absolute().as_uri() if tracking_uri.startswith("sqlite") else None
        )
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=where, tags=MODEL_TRAINING))
            except MlflowException:  # another delivery was first
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _roles(self) -> dict[str, str]:
        """What users call each model, by digest."""
        return {model["digest"]: role for role, model in reversed(self.evaluated.items())}

    def _tags(self) -> dict[str, str]:
        """What every run of this pipeline carries."""
        tags = {
            f"{TAG}run": self.run,
            f"{TAG}recipe-digest": self.record.get("recipe_digest") or digest_of(self.record["recipe"]),
            f"{TAG}store": self.store.uri,
            f"{TAG}identity": digest_of([self.store.uri, self.run]),
            "mlflow.source.name": f"recipe {self.record['recipe_name']}",
            "mlflow.source.type": "PROJECT",
        }
        commit = self.record.get("git_commit")
        return tags | ({COMMIT: commit} if commit else {})

    def _parent_run(self) -> "Run":
        """The run of the pipeline, made where it is not there."""
        tags = self._tags()
        found = self._search(f"tags.`{TAG}identity` = '{tags[f'{TAG}identity']}' AND tags.`{TAG}part` = 'pipeline'")
        run = (
            found[0]
            if found
            else self.client.create_run(
                self.experiment_id,
                start_time=milliseconds(self.record["started"]),
                tags={**tags, f"{TAG}part": "pipeline"},
                run_name=self.run,
            )
        )
        for batch in batches(_params(self.record["recipe"]), 100):
            self.client.log_batch(run.info.run_id, params=batch)
        return run

    def _stage_runs(self) -> dict[tuple[str, str], "Run"]:
        """The runs of stages that MLflow knows, by label and key."""
        found = self._search(f"tags.`mlflow.parentRunId` = '{self.run_id}'")
        ended_last = sorted(found, key=lambda run: (run.info.status == "FINISHED", run.info.run_id))
        return {(run.data.tags[f"{TAG}label"], run.data.tags[f"{TAG}stage-key"]): run for run in ended_last}

    def _search(self, where: str) -> "list[Run]":
        """All runs that a filter lets through."""
        page = self.client.search_runs([self.experiment_id], where, max_results=1000)
        found = list(page)
        while page.token:
            page = self.client.search_runs([self.experiment_id], where, max_results=1000, page_token=page.token)
            found += page
        return found

    def _kind(self, digest: str) -> str | None:
        return kind_of(self.store, digest)

    def _data(self, records: Sequence[StageRecord]) -> list[tuple[str, str]]:
        """Name and digest of all data of the pipeline, given and made, so that pipelines compare by them."""
        made = {name: digest for record in records for name, digest in record.outputs.items()}
        known = {**made, **self.record["sources"]}.items()
        return [(name, digest) for name, digest in known if self._kind(digest) == "data"]

    def _deliver_stage(self, document: Mapping[str, Any], record: StageRecord, found: "Run | None") -> None:
        """One stage: settings, curves, what it read and made; ended last, which is what marks it whole."""
        # A search tells less of a run than asking for it: it leaves out the models that went in.
        run = self.client.get_run(found.info.run_id) if found else self._create_stage_run(document, record)
        run_id = run.info.run_id
        at = milliseconds(document["finished"])
        for params in batches(_params(record.config), 100):
            self.client.log_batch(run_id, params=params)
        for metrics in batches(self._stage_metrics(document, record, at), 1000):
            self.client.log_batch(run_id, metrics=metrics)
        self._log_inputs(run, record)
        self._log_outputs(run, record)
        if record.stage == "eval":
            self._log_evaluation(run_id, record, at)
        if record.stage == "deploy":
            self._register(run_id, record)
        self.client.set_terminated(run_id, "FINISHED", at)

    def _create_stage_run(self, document: Mapping[str, Any], record: StageRecord) -> "Run":
        tags = self._tags() | {
            "mlflow.parentRunId": self.run_id,
            f"{TAG}stage": record.stage,
            f"{TAG}label": document["label"],
            f"{TAG}stage-key": record.key,
            f"{TAG}code-digest": record.code,
            f"{TAG}cached": str(document["cached"]).lower(),
            **{f"{TAG}output.{name}": address(self.store, digest) for name, digest in record.outputs.items()},
        }
        start = milliseconds(document["started"])
        return self.client.create_run(self.experiment_id, start_time=start, tags=tags, run_name=document["label"])

    def _stage_metrics(self, document: Mapping[str, Any], record: StageRecord, at: int) -> list[Any]:
        """Curves and final numbers; of a cached stage too, so that any two runs can be laid side by side."""
        from mlflow.entities import Metric

        final = {**numbers(record.result), "seconds": record.seconds, "seconds_in_this_run": document["seconds"]}
        metrics = [Metric(f"result/{name}", value, at, 0) for name, value in final.items()]
        for name, curve in stage_curves(self.store, record.key).items():
            points = zip(curve["step"], curve["value"], curve["time"], strict=True)
            metrics += [Metric(name, value, milliseconds(time), int(step)) for step, value, time in points]
        return metrics

    def _log_inputs(self, run: "Run", record: StageRecord) -> None:
        """Data by digest, models by the entry that stands for them, once: MLflow refuses a model that it has."""
        from mlflow.entities import LoggedModelInput

        inputs = list(_each(record.inputs))
        kinds = {digest: self._kind(digest) for _, digest in inputs}
        data = [(name, digest) for name, digest in inputs if kinds[digest] != "model"]
        models = {self.models.entry(digest) for _, digest in inputs if kinds[digest] == "model"}
        known = {model.model_id for model in run.inputs.model_inputs} if run.inputs else set()
        entries = [LoggedModelInput(model_id) for model_id in sorted(models - known)]
        self.client.log_inputs(run.info.run_id, datasets=dataset_inputs(self.store, data), models=entries)

    def _log_outputs(self, run: "Run", record: StageRecord) -> None:
        """The models that the stage made, each with the models it was made from."""
        from mlflow.entities import LoggedModelOutput

        made = {name: digest for name, digest in record.outputs.items() if self._kind(digest) == "model"}
        models = {
            self.models.entry(digest, name=name, run_id=run.info.run_id, record=record) for name, digest in made.items()
        }
        known = {model.model_id for model in run.outputs.model_outputs} if run.outputs else set()
        if new := sorted(models - known):
            self.client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step=0) for model_id in new])

    def _log_evaluation(self, run_id: str, record: StageRecord, at: int) -> None:
        """What was measured of each model, tied to the model and the problems; a step of the curve is a model."""
        from mlflow.entities import Metric

        problems = record.inputs.get("problems")
        data = {"dataset_name": "problems", "dataset_digest": str(problems)[:36]} if problems else {}
        metrics = [
            Metric(name, value, at, place, model_id=self.models.entry(model["digest"]), **data)
            for place, model in enumerate(self.evaluated.values())
            for name, value in numbers({key: model[key] for key in MEASURED}).items()
        ]
        for batch in batches(metrics, 1000):
            self.client.log_batch(run_id, metrics=batch)

    def _register(self, run_id: str, record: StageRecord) -> None:
        """A version of the registered model for the deployed bundle, under the alias that the gate gave it."""
        from mlflow.exceptions import MlflowException

        name, digest = record.result.get("registered_model"), record.outputs.get("bundle")
        if not isinstance(name, str) or digest is None:
            return
        with contextlib.suppress(MlflowException):  # it is there already
            self.client.create_registered_model(name)
        same = self._versions(name, digest)
        version = same[0] if same else self._create_version(name, digest, run_id, record)
        self.versions[name, digest] = version.version
        alias = record.result.get("alias")
        if isinstance(alias, str):
            self.client.set_registered_model_alias(name, alias, version.version)

    def _versions(self, name: str, digest: str) -> list[Any]:
        """Versions of a registered model that stand for a bundle."""
        found = self.client.search_model_versions(f"name = '{name}'")
        return [version for version in found if version.tags.get(f"{TAG}digest") == digest]

    def _create_version(self, name: str, digest: str, run_id: str, record: StageRecord) -> Any:
        model_id = self.models.entry(digest)
        tags = {f"{TAG}digest": digest, f"{TAG}address": address(self.store, digest), f"{TAG}run": self.run}
        tags |= {name: value for name, value in self._tags().items() if name in (f"{TAG}recipe-digest", COMMIT)}
        tags |= {f"{TAG}{key}": str(value) for key, value in flatten({"gate": record.result.get("gate")}).items()}
        return self.client.create_model_version(
            name, f"models:/{model_id}", run_id=run_id, model_id=model_id, tags=tags
        )


MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow's UI open on runs and models rather than on traces of chats."""
MEASURED = ("accuracy", "format", "tokens_per_second", "parameters", "kv_bytes_per_token")


class _Models:
    """MLflow's entries of models: one a digest and experiment, whichever runs made it."""

    def __init__(self, client: "MlflowClient", store: Store, experiment_id: str, roles: Mapping[str, str]) -> None:
        self._client, self._store, self._experiment_id, self._roles = client, store, experiment_id, roles
        self._known: dict[str, str] = {}

    def entry(
        self, digest: str, *, name: str = "given", run_id: str | None = None, record: StageRecord | None = None
    ) -> str:
        """The id of a model's entry, made where it is not there.

        Args:
            digest: the model.
            name: what to call it where it has no role in the run.
            run_id: the run that made it; None of a model that the user gave.
            record: the stage that made it.
        """
        if digest not in self._known:
            found = self._find(digest)
            self._known[digest] = found[0].model_id if found else self._create(digest, name, run_id, record)
            if not found or found[0].status != "READY":
                self._client.finalize_logged_model(self._known[digest], "READY")
        return self._known[digest]

    def remove_doubles(self) -> None:
        """Remove further entries of models that were looked up."""
        for digest, kept in self._known.items():
            for model in self._find(digest):
                if model.model_id != kept:
                    self._client.delete_logged_model(model.model_id)

    def _find(self, digest: str) -> Sequence[Any]:
        """Entries of a model."""
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


def _params(values: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(name, str(value)) for name, value in flatten(values).items()]
