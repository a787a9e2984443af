"""The MLflow runs of a pipeline, found by tags: one for the pipeline, below it one for each stage.

The sender of a working stage and the delivery at the end of the pipeline both use them. Whoever comes first creates a
run, the other finds it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from components.core.base.config import digest_of
from components.core.lineage.curves import Point
from components.core.lineage.mlflow_entities import batches, milliseconds, params
from components.core.store.store import Store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

TAG = "tessera.dev/"
COMMIT = "mlflow.source.git.commit"
MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Makes MLflow's UI open on runs and models rather than on traces of chats."""
METRICS_PER_REQUEST, PARAMS_PER_REQUEST = 1000, 100
MAX_ERROR_CHARACTERS = 500
END_STATUS = {"finish": "FINISHED", "cached": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
"""MLflow's status of a stage by the event that ends it."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage, as its events describe it; times are Unix seconds."""

    stage: str
    label: str
    key: str
    started: float
    status: str = "RUNNING"
    ended: float | None = None
    error: str = ""
    """First line of the error of a failed attempt."""


def last_attempt(events: Iterable[Mapping[str, Any]], attempt: Attempt | None = None) -> Attempt | None:
    """The last attempt that events describe; `attempt` is the one that earlier events began."""
    for event in events:
        if event["type"] == "start":
            attempt = Attempt(event["stage"], event["label"], event["key"], event["time"])
        elif attempt is not None and event["type"] in END_STATUS:
            error = (str(event.get("error") or "").splitlines() or [""])[0][:MAX_ERROR_CHARACTERS]
            attempt = replace(attempt, status=END_STATUS[event["type"]], ended=event["time"], error=error)
    return attempt


class PipelineRuns:
    """Finds and creates the MLflow runs of one pipeline.

    Attributes:
        pipeline: the pipeline's own run.
        stages: the runs of stages, by label and key.
        duplicates: runs that were created twice, by a request whose answer was lost or by two machines at once.
    """

    def __init__(self, client: "MlflowClient", store: Store, record: Mapping[str, Any], tracking_uri: str) -> None:
        self.client, self._store, self._record = client, store, record
        self.experiment_id = self._experiment(tracking_uri)
        self.stages: dict[tuple[str, str], Run] = {}
        self.duplicates: list[Run] = []
        for run in sorted(self._search(), key=_completeness):
            role = (run.data.tags.get(f"{TAG}label", ""), run.data.tags.get(f"{TAG}stage-key", ""))
            if role in self.stages:
                self.duplicates.append(self.stages[role])
            self.stages[role] = run
        found = ("", "") in self.stages
        self.pipeline = self.stages.pop(("", "")) if found else self._create_pipeline()
        for batch in batches(params(record["recipe"]), PARAMS_PER_REQUEST):
            self.client.log_batch(self.pipeline.info.run_id, params=batch)

    def stage(self, stage: str, label: str, key: str, started: float) -> "Run":
        """The run of a stage, created where MLflow has none."""
        found = self.stages.get((label, key))
        if found is None:
            tags = {f"{TAG}stage": stage, f"{TAG}label": label, f"{TAG}stage-key": key}
            tags |= self.tags() | {"mlflow.parentRunId": self.pipeline.info.run_id}
            found = self._create(started, tags, label)
            self.stages[label, key] = found
        return found

    def reopen(self, run: "Run") -> None:
        """Mark a run that has ended as running again: its work continues."""
        if run.info.status != "RUNNING":
            self.client.update_run(run.info.run_id, "RUNNING")
        if f"{TAG}error" in run.data.tags:
            self.client.delete_tag(run.info.run_id, f"{TAG}error")

    def end(self, run: "Run", status: str, ended: float, error: str = "") -> None:
        """Mark a run as ended, with the first line of the error of one that failed."""
        if error:
            self.client.set_tag(run.info.run_id, f"{TAG}error", error)
        self.client.set_terminated(run.info.run_id, status, milliseconds(ended))

    def tags(self) -> dict[str, str]:
        """What every run of this pipeline carries."""
        record = self._record
        tags = {
            f"{TAG}run": record["run"],
            f"{TAG}recipe-digest": record.get("recipe_digest") or digest_of(record["recipe"]),
            f"{TAG}store": self._store.uri,
            f"{TAG}identity": digest_of([self._store.uri, record["run"]]),
            "mlflow.source.name": f"recipe {record['recipe_name']}",
            "mlflow.source.type": "PROJECT",
        }
        commit = record.get("git_commit")
        return tags | ({COMMIT: commit} if commit else {})

    def _experiment(self, tracking_uri: str) -> str:
        """The experiment of the recipe, created where MLflow has none."""
        from mlflow.exceptions import MlflowException

        name = self._record["recipe_name"]
        artifacts = (self._store.local / "mlflow-artifacts").absolute().as_uri()
        where = artifacts if tracking_uri.startswith("sqlite") else None
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=where, tags=MODEL_TRAINING))
            except MlflowException:  # another process was first
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _create_pipeline(self) -> "Run":
        return self._create(self._record["started"], self.tags() | {f"{TAG}part": "pipeline"}, self._record["run"])

    def _create(self, started: float, tags: dict[str, str], name: str) -> "Run":
        return self.client.create_run(self.experiment_id, start_time=milliseconds(started), tags=tags, run_name=name)

    def _search(self) -> "list[Run]":
        """All runs of the pipeline and its stages."""
        where = f"tags.`{TAG}identity` = '{self.tags()[f'{TAG}identity']}'"
        page = self.client.search_runs([self.experiment_id], where, max_results=1000)
        found = list(page)
        while page.token:
            page = self.client.search_runs([self.experiment_id], where, max_results=1000, page_token=page.token)
            found += page
        return found


class RunMetrics:
    """The curves of one MLflow run: adds the points after the last step that MLflow has, so that each is there once."""

    def __init__(self, client: "MlflowClient", run: "Run") -> None:
        self._client, self._run = client, run
        self._last_steps: dict[str, float] = {}

    def log(self, points: Sequence[Point]) -> None:
        """Send points in their order; after an error the object must not be used again."""
        from mlflow.entities import Metric

        new: list[Metric] = []
        for point in points:
            if point.step > self._last_step(point.metric):
                self._last_steps[point.metric] = point.step
                new.append(Metric(point.metric, point.value, milliseconds(point.time), point.step))
        for batch in batches(new, METRICS_PER_REQUEST):
            self._client.log_batch(self._run.info.run_id, metrics=batch)

    def _last_step(self, metric: str) -> float:
        """The highest step that MLflow has of a metric; asked once."""
        if metric not in self._last_steps:
            run_id, recorded = self._run.info.run_id, metric in self._run.data.metrics
            history = self._client.get_metric_history(run_id, metric) if recorded else []
            self._last_steps[metric] = max((point.step for point in history), default=float("-inf"))
        return self._last_steps[metric]


def _completeness(run: "Run") -> tuple[bool, bool, int, str]:
    """Order of the runs that MLflow has of one stage: the last holds most and is used."""
    return run.info.status == "FINISHED", run.info.status != "RUNNING", len(run.data.metrics), run.info.run_id
