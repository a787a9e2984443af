"""One step of a `Retraining` towards what its specification asks for.

What a step knows is in the object's status, Kubeflow Pipelines and the store. A run is decided on by one write of the
status, which names it; then it is submitted; then its end is awaited. Each part can be done again without effect, so an
operator that is killed anywhere, or runs twice, neither starts a run twice nor forgets one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from components.core.base.errors import ClusterError, TesseraError
from components.core.store.store import Store
from pipelines.promotion.platform_settings import OperatorSettings
from pipelines.promotion.repository import BranchFiles
from pipelines.promotion.rules import Promotion
from pipelines.recipe.checks import check
from pipelines.retraining.cluster import Objects, Retraining
from pipelines.retraining.dataset import copy_into_store, observe, open_folder
from pipelines.retraining.decision import judge_plan
from pipelines.retraining.follow_promotion import PromotionFollower
from pipelines.retraining.follow_run import RunFollower
from pipelines.retraining.price import price_run
from pipelines.retraining.spec import APPROVED, RecipeSource, RetrainingSpec
from pipelines.retraining.status import Attempt, Phase, Plan, RetrainingStatus, StageStatus
from pipelines.retraining.triggers import Due, find_due, firing_since, newest_triggers
from pipelines.retraining.wanted_run import WantedRun, inline_text, read_wanted_run
from pipelines.run.kfp_server import KfpServer
from pipelines.run.submit import Submitter, pod_store


@dataclass(frozen=True)
class Connections:
    """How a step reaches the cluster.

    Attributes:
        objects: the API server.
        server: Kubeflow Pipelines, by the namespace of the runs.
        submitter: submits to a server, by the store's address and the namespace.
        clock: the present time.
        settings: repositories of recipes and promotions, and the Alertmanager.
        files: recipes in Git.
    """

    objects: Objects
    server: Callable[[str], KfpServer]
    submitter: Callable[[str, KfpServer, str], Submitter]
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    settings: OperatorSettings = field(default_factory=OperatorSettings)
    files: BranchFiles = field(default_factory=BranchFiles)


class Outcome(NamedTuple):
    """A step of an object: its status before and after, and its specification, None where that is wrong."""

    before: RetrainingStatus
    after: RetrainingStatus
    spec: RetrainingSpec | None


def reconcile(connections: Connections, namespace: str, name: str) -> Outcome | None:
    """Take the step that an object needs now, and write its status; None without the object.

    Raises:
        TesseraError: the API server does not answer, or somebody else has changed the object meanwhile.
    """
    found = connections.objects.read(namespace, name)
    if found is None:
        return None
    before = found.status.model_copy(deep=True)
    step = _Step(connections, found)
    return Outcome(before, step.take(), step.spec)


class _Step:
    """A step of one object."""

    def __init__(self, connections: Connections, found: Retraining) -> None:
        self._connections, self._found = connections, found
        self._status = found.status.model_copy(deep=True)
        self._now = connections.clock().replace(microsecond=0)
        self._warning = ""
        self.spec: RetrainingSpec | None = None

    def take(self) -> RetrainingStatus:
        """Take the step. An error of the user's is a condition; the next step tries again."""
        try:
            spec = self.spec = RetrainingSpec.parse(self._found.body["spec"], where="spec")
            self._advance(spec)
        except TesseraError as error:
            self._status.judge("Ready", False, type(error).__name__, str(error), self._now)
            if self._status.attempt is None:
                self._show("Invalid", type(error).__name__)
        else:
            reason = "AlertsUnknown" if self._warning else "Reconciled"
            self._status.judge("Ready", True, reason, self._warning, self._now)
        is_settled = self._status.phase in ("Ready", "Suspended")
        self._status.wanted_since = None if is_settled else self._status.wanted_since or self._now
        self._status.observed_generation = self._found.body["metadata"].get("generation", 0)
        self._write()
        return self._status

    def _advance(self, spec: RetrainingSpec) -> None:
        """Follow the promotion that there is, and the run, or decide on one and submit it."""
        if spec.promote is not None:
            self._promote(spec, spec.promote)
        if self._status.attempt is None:
            self._decide(spec)
        attempt = self._status.attempt
        if attempt is None:
            return
        follower = self._follower(store := pod_store(attempt.store))
        if follower.find() is None:
            wanted = self._wanted(spec, store)
            if wanted.identity != attempt.identity:
                self._status.attempt = None  # nothing was started yet; the next step plans anew
                return
            follower.submit(wanted.recipe)
        self._write()
        follower.follow(spec.budget.wall_hours, spec.history)

    def _decide(self, spec: RetrainingSpec) -> None:
        """Decide on a run, where a trigger asks for one and nothing is in its way."""
        if spec.suspend:
            self._show("Suspended", "Suspended")
            return
        store = pod_store(spec.store)
        has_data = self._observe_dataset(spec, store)
        wanted = self._wanted(spec, store)
        due = find_due(self._snapshot(), spec, wanted.identity, self._now, self._firing_since(spec))
        if due is not None and has_data:
            self._plan(spec, store, wanted, due)
            return
        if due is None:
            self._status.consumed.schedule = newest_triggers(self._found, spec, self._now).schedule
        self._rest(has_data)

    def _plan(self, spec: RetrainingSpec, store: Store, wanted: WantedRun, due: Due) -> None:
        """Plan a run; decide on it where the budget or a person allows."""
        check(wanted.recipe)
        status = self._status
        name, after = self._follower(store).choose_name(wanted.name, anew=due.even_unchanged)
        prices = price_run(wanted.recipe, wanted.inputs, store, [past.run for past in status.runs])
        status.stages = [
            StageStatus(label=each.label, plan="Reused" if each.is_reused else "Anew", gpu_hours=each.gpu_hours)
            for each in prices
        ]
        status.plan = Plan(
            run=name,
            trigger=due.trigger,
            gpu_hours=round(sum(each.gpu_hours or 0.0 for each in prices), 3),
            unmeasured=[each.label for each in prices if each.gpu_hours is None],
        )
        status.run_id, status.recipe_digest = name, wanted.recipe.digest
        status.forget("Running", "Succeeded")
        approved_run = self._found.annotations.get(APPROVED, "")
        target = f"-n {self._found.namespace} {self._found.name}"
        if not judge_plan(status, spec.budget, approved_run, target, self._now):
            return
        status.plan = None
        status.attempt = Attempt(
            run=name,
            trigger=due.trigger,
            identity=wanted.identity,
            recipe_digest=wanted.recipe.digest,
            inputs=wanted.inputs,
            store=store.uri,
            answers=due.answers,
            after=after,
        )
        self._show("Running", "Starting")
        self._write()

    def _promote(self, spec: RetrainingSpec, rules: Promotion) -> None:
        """Take the step that the promotion needs."""
        connections, found = self._connections, self._found
        place, store = (found.namespace, found.name), pod_store(spec.store)
        PromotionFollower(
            self._status, rules, place, store, connections.objects, connections.settings, self._write, self._now
        ).advance()

    def _firing_since(self, spec: RetrainingSpec) -> datetime | None:
        """Since when the newest alert fires; without an answer, the other triggers go on."""
        if not spec.trigger.alerts:
            return None
        try:
            return firing_since(self._connections.settings.alertmanager, spec.trigger.alerts)
        except ClusterError as error:
            self._warning = str(error)
            return None

    def _follower(self, store: Store) -> RunFollower:
        """What knows the run of the attempt."""
        connections, namespace = self._connections, self._found.namespace
        server = connections.server(namespace)
        return RunFollower(self._status, server, connections.submitter(store.uri, server, namespace), store, self._now)

    def _observe_dataset(self, spec: RetrainingSpec, store: Store) -> bool:
        """Look at the data set, and make an artifact of it once it is quiet; returns whether there is one to use."""
        trigger = spec.trigger.dataset
        if trigger is None:
            self._status.dataset = None
            return True
        folder = open_folder(trigger.prefix)
        dataset = self._status.dataset = observe(folder, self._status.dataset, self._now)
        if dataset.artifact_of != dataset.fingerprint and self._now - dataset.since >= trigger.quiet_time:
            dataset.artifact = copy_into_store(folder, dataset, store)
            dataset.artifact_of = dataset.fingerprint
        return bool(dataset.artifact)

    def _wanted(self, spec: RetrainingSpec, store: Store) -> WantedRun:
        """The run that the recipe asks for now."""
        text, values = self._recipe_text(spec.recipe), dict(spec.set)
        if spec.trigger.dataset is not None and self._status.dataset is not None and self._status.dataset.artifact:
            values[spec.trigger.dataset.input] = self._status.dataset.artifact
        return read_wanted_run(self._found.name, text, values, store)

    def _recipe_text(self, source: RecipeSource) -> str:
        """The recipe as its source has it now."""
        connections = self._connections
        if source.git is not None:
            found = connections.files.read(connections.settings.repository(source.git.repository), source.git)
            self._status.recipe_commit = found.commit
            return found.text
        self._status.recipe_commit = ""
        if source.config_map is not None:
            return connections.objects.config_map(self._found.namespace, source.config_map, source.key)
        return inline_text(source.inline or {})

    def _rest(self, has_data: bool) -> None:
        """Show that there is nothing to do."""
        status = self._status
        if status.plan is not None:  # what asked for it has gone
            status.plan, status.stages = None, []
            status.run_id, status.recipe_digest = "", ""
            status.forget("Planned", "WithinBudget", "Approved")
        if status.runs:
            status.run_id, status.recipe_digest = status.runs[0].run, status.runs[0].recipe_digest
        if not has_data:
            self._show("WaitingForData", "DatasetNotQuiet")
        elif status.runs and status.runs[0].state != "Succeeded":
            self._show("Failed", f"Run{status.runs[0].state}")
        else:
            self._show("Ready", "UpToDate" if status.runs else "NoTrigger")

    def _snapshot(self) -> Retraining:
        """The object with the status as this step has it so far."""
        return Retraining(self._found.body | {"status": self._status.dump()})

    def _show(self, phase: Phase, reason: str) -> None:
        self._status.phase, self._status.reason = phase, reason

    def _write(self) -> None:
        """Write the status where it has changed."""
        if self._status.dump() != self._found.status.dump():
            self._connections.objects.write_status(self._found, self._status)
