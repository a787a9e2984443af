"""The run of a `Retraining` in Kubeflow Pipelines: named, submitted, followed to its end, forgotten when it is old."""

from datetime import UTC, datetime

from components.core.store.store import Store, record_path
from pipelines.recipe.schema import Recipe
from pipelines.records.runs import end_run, run_names, run_record, stage_documents
from pipelines.retraining.price import spent_gpu_hours
from pipelines.retraining.status import PastRun, RetrainingStatus, RunState
from pipelines.run.kfp_server import KfpRun, KfpServer
from pipelines.run.submit import OUTCOMES, Submitter

MAX_MESSAGE = 1000
"""Longest error of a run in the status, characters."""


class RunFollower:
    """The run that the status names as its attempt.

    Args:
        status: is kept up to date.
        server: has the run.
        submitter: submits the run.
        store: has the records of the run.
        now: the present time.
    """

    def __init__(
        self, status: RetrainingStatus, server: KfpServer, submitter: Submitter, store: Store, now: datetime
    ) -> None:
        self._status, self._server, self._submitter, self._store, self._now = status, server, submitter, store, now
        self._run: KfpRun | None = None

    def choose_name(self, name: str, *, anew: bool) -> tuple[str, str]:
        """Name of the next run, and the id of an earlier attempt of this name that has ended without success.

        Args:
            name: by the recipe and its inputs. A run of this name that has succeeded is the run that is asked for.
            anew: take a further name instead of a run that has succeeded.
        """
        number, chosen = 1, name
        while True:
            found = self._server.find_run(chosen)
            if found is None or found.is_active:
                return chosen, ""
            if not self._has_succeeded(chosen, found):
                return chosen, found.id
            if not anew:
                return chosen, ""
            number += 1
            chosen = f"{name}-{number}"

    def find(self) -> KfpRun | None:
        """The run of the attempt, None where it has not been submitted.

        A run that Kubeflow Pipelines had and has no more counts as one that has failed.
        """
        attempt = self._status.attempt
        assert attempt is not None
        found = self._server.find_run(attempt.run)
        self._run = None if found is None or found.id == attempt.after else found
        if self._run is None and attempt.kfp_run:
            self._run = KfpRun(attempt.kfp_run, "FAILED", "Kubeflow Pipelines has this run no more")
        if self._run is not None:
            self._adopt(self._run)
        return self._run

    def submit(self, recipe: Recipe) -> None:
        """Submit the run.

        Raises:
            InputError: the recipe cannot be used, or asks for more than the cluster has.
        """
        attempt = self._status.attempt
        assert attempt is not None
        self._run = self._submitter.submit(recipe, attempt.run).kfp
        assert self._run is not None
        self._adopt(self._run)

    def follow(self, wall_hours: float | None, history: int) -> None:
        """Bring the status up to date with the run; end it where it takes too long.

        Args:
            wall_hours: duration after which the run is ended.
            history: number of ended runs that stay.
        """
        attempt, run = self._status.attempt, self._run
        assert attempt is not None and run is not None  # noqa: PT018
        finished = set(stage_documents(self._store, attempt.run))
        self._status.stages = [
            stage.model_copy(update={"finished": stage.label in finished}) for stage in self._status.stages
        ]
        record = run_record(self._store, attempt.run)
        attempt.started = datetime.fromtimestamp(record["started"], UTC).replace(microsecond=0)
        is_late = wall_hours is not None and self._now.timestamp() - record["started"] > wall_hours * 3600
        if not run.is_active:
            self._end(run, is_late)
            self._remove_old_runs(history)
            return
        done = f"{len(finished & {s.label for s in self._status.stages})} of {len(self._status.stages)} stages finished"
        self._status.judge("Running", True, "Running", f"run {attempt.run}: {done}", self._now)
        self._status.phase, self._status.reason = "Running", attempt.trigger
        if is_late:
            self._status.judge(
                "Running", True, "WallTimeExceeded", f"run {attempt.run} is ended after {wall_hours:g} h", self._now
            )
            self._status.reason = "WallTimeExceeded"
            if run.state != "CANCELING":
                recipe = Recipe.parse(record["recipe"])
                self._submitter.cancel(self._submitter.find(recipe, attempt.run))

    def _adopt(self, run: KfpRun) -> None:
        """Take a run as that of the attempt, which has now answered its triggers."""
        attempt = self._status.attempt
        assert attempt is not None
        attempt.kfp_run = run.id
        self._status.consumed = attempt.answers
        self._status.run_id, self._status.recipe_digest = attempt.run, attempt.recipe_digest
        self._status.phase, self._status.reason = "Running", attempt.trigger

    def _end(self, run: KfpRun, is_late: bool) -> None:
        """Move the attempt to the runs that have ended."""
        status, attempt = self._status, self._status.attempt
        assert attempt is not None
        record = run_record(self._store, attempt.run)
        if record["status"] == "running":  # its last pod, which records the end, did not come so far
            record = end_run(self._store, attempt.run, OUTCOMES.get(run.state, "failed"))
        states: dict[str, RunState] = {"SUCCEEDED": "Succeeded", "CANCELED": "Stopped"}
        state: RunState = "Stopped" if record["status"] == "interrupted" else states.get(run.state, "Failed")
        message = "" if state == "Succeeded" else self._reason(run)
        past = PastRun(
            run=attempt.run,
            state=state,
            trigger=attempt.trigger,
            recipe_digest=attempt.recipe_digest,
            identity=attempt.identity,
            kfp_run=run.id,
            finished=self._now,
            gpu_hours=round(spent_gpu_hours(Recipe.parse(record["recipe"]), self._store, attempt.run), 3),
            message=message,
        )
        reason = "WallTimeExceeded" if state == "Stopped" and is_late else f"Run{state}"
        status.runs = [past, *(each for each in status.runs if each.run != attempt.run)]
        status.judge("Running", False, reason, f"run {attempt.run} has ended", self._now)
        status.judge("Succeeded", state == "Succeeded", reason, message or f"run {attempt.run}", self._now)
        status.phase, status.reason = ("Ready", "UpToDate") if state == "Succeeded" else ("Failed", reason)
        if state == "Succeeded":
            status.last_succeeded = self._now
        status.attempt = None

    def _reason(self, run: KfpRun) -> str:
        """Why a run failed: the error that a stage refused its input with, or else what Kubeflow Pipelines says."""
        assert self._status.attempt is not None
        for path in self._store.documents(f"runs/{self._status.attempt.run}/refusals/"):
            refusal = self._store.read_document_or_none(path)
            if refusal is not None:
                return str(refusal["error"])[:MAX_MESSAGE]
        return (run.error or run.state)[:MAX_MESSAGE]

    def _has_succeeded(self, name: str, found: KfpRun) -> bool:
        """Whether a run has succeeded in Kubeflow Pipelines and in the store."""
        is_known = name in run_names(self._store)
        return found.state == "SUCCEEDED" and is_known and run_record(self._store, name)["status"] == "succeeded"

    def _remove_old_runs(self, history: int) -> None:
        """Forget the runs beyond the history, but not those whose models may be in use.

        These are the last one that has succeeded, the one that is promoted, and the champion's.
        """
        runs = self._status.runs
        last_good = next((each for each in runs if each.state == "Succeeded"), None)
        gate, promotion = self._status.gate, self._status.promotion
        used = {
            gate.champion_run if gate else "",
            promotion.run if promotion else "",
            last_good.run if last_good else "",
        }
        kept = [each for number, each in enumerate(runs) if number < history or each.run in used]
        for old in runs:
            if old not in kept:
                forget_run(self._store, old.run)
        self._status.runs = kept


def forget_run(store: Store, run: str) -> None:
    """Remove the records of a run, and those of its stages that no other run has.

    The run's own records are removed last: they name the stages where this is done again.
    """
    others = {key for other in run_names(store) if other != run for key in _keys(store, other)}
    for key in _keys(store, run) - others:
        store.backend.delete(record_path(key))
    for path in store.documents(f"runs/{run}/"):
        store.backend.delete(path)


def _keys(store: Store, run: str) -> set[str]:
    """Keys of the finished stages of a run."""
    return {document["key"] for document in stage_documents(store, run).values()}
