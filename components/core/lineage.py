"""What runs did, told to MLflow: a run a pipeline, a nested run a stage, data and models by digest, the registry.

Stages never talk to MLflow. They leave records and curves in the store, and `deliver` tells MLflow of them afterwards.
What is there already is recognised by tags, so that a second delivery, or one after a crash, adds what is missing and
nothing else. Weights stay in the store: MLflow holds digests and addresses.
"""

import contextlib
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.core.config import digest_of
from components.core.curves import record_curves, stage_curves
from components.core.errors import TesseraError
from components.core.lineage_entries import (
    batches,
    dataset_inputs,
    flatten,
    git_commit,
    milliseconds,
    model_facts,
    numbers,
    summary_metrics,
)
from components.core.store import StageRecord, Store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

TAG = "tessera.dev/"
STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
PROBE_TIMEOUT_S = 5.0


class LineageError(TesseraError):
    """MLflow does not answer; the records stay in the store until it does."""


def deliver(store: Store, run: str, tracking_uri: str) -> None:
    """Tell MLflow of a run: its stages, curves, data, models and deployment, whatever it does not know yet.

    Args:
        store: where the run left its records, curves and `summary.json`.
        run: name of the run, ended or not.
        tracking_uri: an MLflow server, or `sqlite:///PATH`.

    Raises:
        LineageError: MLflow cannot be reached or refuses; nothing is lost.
    """
    record = store.document(f"runs/{run}/run.json")
    with _tracking(tracking_uri) as client:
        _Pipeline(client, store, record, tracking_uri).deliver()
    store.put_document(_receipt_path(run), _receipt(record, tracking_uri))


def deliver_pending(store: Store, tracking_uri: str) -> list[str]:
    """Deliver the ended runs that no delivery has reached since they ended; returns their names.

    Raises:
        LineageError: MLflow cannot be reached or refuses.
    """
    paths = [path for path in store.documents("runs/") if path.endswith("/run.json")]
    records = [record for path in paths if (record := store.whole_document(path)) is not None]
    pending = [
        record["run"]
        for record in sorted(records, key=lambda record: record["started"])
        if record["status"] in STATUS and store.document(_receipt_path(record["run"])) != _receipt(record, tracking_uri)
    ]
    for run in pending:
        record_curves(store, run)
        deliver(store, run, tracking_uri)
    return pending


class _Pipeline:
    """The delivery of one run."""

    def __init__(self, client: "MlflowClient", store: Store, record: dict[str, Any], tracking_uri: str) -> None:
        self.client, self.store, self.record, self.run = client, store, record, record["run"]
        self.summary: dict[str, Any] = store.document(f"runs/{self.run}/summary.json") or {}
        self.evaluated = {**self.summary.get("models", {}), **self.summary.get("baselines", {})}
        self.experiment_id = self._experiment(tracking_uri)
        self.models = _Models(client, store, self.experiment_id, self._roles())
        self.run_id = ""

    def deliver(self) -> None:
        """The run, then its stages in the order in which they ended, then how it ended."""
        parent = self._parent_run()
        self.run_id = parent.info.run_id
        known = self._stage_runs()
        paths = self.store.documents(f"runs/{self.run}/stages/")
        documents = [found for path in paths if (found := self.store.whole_document(path)) is not None]
        records: list[StageRecord] = []
        for document in sorted(documents, key=lambda document: document["finished"]):
            record = self.store.stage_record(document["key"])
            if record is None:
                continue
            records.append(record)
            found = known.get((document["label"], document["key"]))
            if found is None or found.info.status != "FINISHED":
                self._deliver_stage(document, record, found)
        self.client.log_inputs(self.run_id, datasets=dataset_inputs(self._data(records)))
        at = milliseconds(self.record["finished"] or self.record["started"])
        for batch in batches(summary_metrics(self.summary, at), 1000):
            self.client.log_batch(self.run_id, metrics=batch)
        if status := STATUS.get(self.record["status"]):
            self.client.set_terminated(self.run_id, status, at)

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
        commit = self.record.get("git_commit") or git_commit()
        return tags | ({"mlflow.source.git.commit": commit} if commit else {})

    def _parent_run(self) -> "Run":
        """The run of the pipeline, made where it is not there."""
        tags = self._tags()
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{TAG}identity` = '{tags[f'{TAG}identity']}' AND tags.`{TAG}part` = 'pipeline'"
        )
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
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`mlflow.parentRunId` = '{self.run_id}'", max_results=1000
        )
        return {(run.data.tags[f"{TAG}label"], run.data.tags[f"{TAG}stage-key"]): run for run in found}

    def _data(self, records: Sequence[StageRecord]) -> list[tuple[str, str, str]]:
        """Name, digest and address of all data of the pipeline, given and made, so that pipelines compare by them."""
        made = {name: digest for record in records for name, digest in record.outputs.items()}
        known = {**made, **self.record["sources"]}.items()
        return [
            (name, digest, address(self.store, digest))
            for name, digest in known
            if self.store.manifest(digest).kind == "data"
        ]

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
        kinds = {digest: self.store.manifest(digest).kind for _, digest in inputs}
        data = [(name, digest, address(self.store, digest)) for name, digest in inputs if kinds[digest] != "model"]
        models = {self.models.entry(digest) for _, digest in inputs if kinds[digest] == "model"}
        known = {model.model_id for model in run.inputs.model_inputs} if run.inputs else set()
        entries = [LoggedModelInput(model_id) for model_id in sorted(models - known)]
        self.client.log_inputs(run.info.run_id, datasets=dataset_inputs(data), models=entries)

    def _log_outputs(self, run: "Run", record: StageRecord) -> None:
        """The models that the stage made, each with the models it was made from."""
        from mlflow.entities import LoggedModelOutput

        made = {name: digest for name, digest in record.outputs.items() if self.store.manifest(digest).kind == "model"}
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
        same = [
            v for v in self.client.search_model_versions(f"name = '{name}'") if v.tags.get(f"{TAG}digest") == digest
        ]
        version = same[0] if same else self._create_version(name, digest, run_id, record)
        alias = record.result.get("alias")
        if isinstance(alias, str):
            self.client.set_registered_model_alias(name, alias, version.version)

    def _create_version(self, name: str, digest: str, run_id: str, record: StageRecord) -> Any:
        model_id = self.models.entry(digest)
        tags = {f"{TAG}digest": digest, f"{TAG}address": address(self.store, digest), f"{TAG}run": self.run}
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
            found = self._client.search_logged_models(
                [self._experiment_id], filter_string=f"tags.`{TAG}digest` = '{digest}'"
            )
            self._known[digest] = found[0].model_id if found else self._create(digest, name, run_id, record)
        return self._known[digest]

    def _create(self, digest: str, name: str, run_id: str | None, record: StageRecord | None) -> str:
        tags = {f"{TAG}digest": digest, f"{TAG}address": address(self._store, digest)}
        if record is not None:
            tags |= {f"{TAG}stage-key": record.key, f"{TAG}stage": record.stage}
            parents = [(f"{TAG}made-from.{name}", parent) for name, parent in _each(record.inputs)]
            tags |= {name: parent for name, parent in parents if self._store.manifest(parent).kind == "model"}
        model = self._client.create_logged_model(
            self._experiment_id,
            name=self._roles.get(digest, name),
            source_run_id=run_id,
            tags=tags,
            params=model_facts(self._store, digest),
            model_type="causal-lm",
        )
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)


def address(store: Store, digest: str) -> str:
    """Where an artifact is, in the form in which a recipe takes it."""
    return f"{store.uri}#{digest}"


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


@contextlib.contextmanager
def _tracking(uri: str) -> Iterator["MlflowClient"]:
    """A client of a tracking server that answers, or of a database; whatever MLflow complains of becomes one error."""
    os.environ |= QUIET
    _probe(uri)
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        mlflow.set_tracking_uri(uri)
        yield mlflow.MlflowClient(uri, registry_uri=uri)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise _unavailable(uri, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _probe(uri: str) -> None:
    """Ask a server for a sign of life: MLflow's own client tries for minutes before it gives up."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in shows later
    except (OSError, ValueError) as error:
        raise _unavailable(uri, str(error)) from error


def _unavailable(uri: str, why: str) -> LineageError:
    return LineageError(
        f"MLflow at {_public(uri)} took no records: {why}",
        hint="they stay in the store; the next run or `tessera ui` delivers them",
    )


def _public(uri: str) -> str:
    """The address without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _receipt(record: Mapping[str, Any], tracking_uri: str) -> dict[str, Any]:
    """What is left in the store when a run was delivered as it is now."""
    return {"tracking_uri": _public(tracking_uri), "finished": record["finished"], "status": record["status"]}


def _receipt_path(run: str) -> str:
    return f"runs/{run}/mlflow.json"
