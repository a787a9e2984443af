"""What the operator writes into a `Retraining`; with Kubeflow Pipelines and the store, all that it remembers."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from components.core.base.kubernetes_objects import StatusPart
from pipelines.promotion.gate import GateResult
from pipelines.promotion.rules import Mode

Phase = Literal["Ready", "WaitingForData", "WaitingForApproval", "Running", "Failed", "Suspended", "Invalid"]
ConditionType = Literal["Ready", "Planned", "WithinBudget", "Approved", "Running", "Succeeded", "Promoted"]
TriggerName = Literal["onChange", "schedule", "dataset", "alert", "now"]
RunState = Literal["Succeeded", "Failed", "Stopped"]
PromotionState = Literal["Requested", "Committed", "Serving", "Ended"]


class Condition(StatusPart):
    """A condition in the manner of Kubernetes."""

    type: ConditionType
    """What is judged."""
    status: Literal["True", "False", "Unknown"]
    """The judgement."""
    reason: str
    """The reason in one word."""
    message: str = ""
    """The reason in a sentence, with its numbers."""
    last_transition_time: datetime
    """When the judgement changed."""


class StageStatus(StatusPart):
    """A stage of the planned, running or last run."""

    label: str
    """Its role in the recipe."""
    plan: Literal["Reused", "Anew"]
    """Whether the store holds its result, or it has to be computed."""
    gpu_hours: float | None = None
    """Estimate from the last run's time and the recipe's placement; absent where it was never measured."""
    finished: bool = False
    """Whether it has finished in the run."""


class Plan(StatusPart):
    """What the next run would do."""

    run: str
    """Name that the run would have; an approval names it."""
    trigger: TriggerName
    """What asks for the run."""
    gpu_hours: float
    """GPU hours of the stages that were measured."""
    unmeasured: list[str] = Field(default_factory=list)
    """Stages on GPUs that no run has measured yet."""


class Consumed(StatusPart):
    """The newest of each trigger that a run has answered."""

    schedule: datetime | None = None
    """Time of the schedule."""
    now: str = ""
    """Value of the annotation."""
    dataset: str = ""
    """Fingerprint of the data set."""
    alert: datetime | None = None
    """Since when the newest alert fires."""


class Attempt(StatusPart):
    """A run that was decided on. It is written before the run is submitted: a restarted operator goes on with it."""

    run: str
    """Name of the run."""
    trigger: TriggerName
    """What asked for it."""
    identity: str
    """Digest of the recipe, its inputs and the store."""
    recipe_digest: str
    """Digest of the recipe."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Digests of the inputs."""
    store: str
    """Address of the store."""
    answers: Consumed = Field(default_factory=Consumed)
    """The triggers that the run answers."""
    after: str = ""
    """Id of an earlier run of this name in Kubeflow Pipelines, which is not this attempt."""
    kfp_run: str = ""
    """Id of the run in Kubeflow Pipelines once it is known there."""
    started: datetime | None = None
    """When the run began, once it is known there."""


class PastRun(StatusPart):
    """A run that has ended."""

    run: str
    """Its name in the store."""
    state: RunState
    """How it ended."""
    trigger: TriggerName
    """What asked for it."""
    recipe_digest: str
    """Digest of the recipe."""
    identity: str
    """Digest of the recipe, its inputs and the store."""
    kfp_run: str = ""
    """Its id in Kubeflow Pipelines."""
    finished: datetime
    """When its end was noticed."""
    gpu_hours: float = 0.0
    """GPU hours of the stages that were computed in it."""
    message: str = ""
    """Why it failed."""


class Dataset(StatusPart):
    """The objects of the data set's folder."""

    fingerprint: str
    """Digest of their names, sizes and entity tags."""
    since: datetime
    """Since when they are like this."""
    objects: int
    """Their number."""
    artifact: str = ""
    """Digest of the artifact that was made of them, or of the quiet ones before them."""
    artifact_of: str = ""
    """Fingerprint of what that artifact was made of."""


class PromotionStatus(StatusPart):
    """A bundle on its way into what is served."""

    run: str
    """Run that made it."""
    bundle: str
    """Its digest."""
    previous: str = ""
    """Digest of the bundle that was served before; empty at the first promotion."""
    mode: Mode
    """How it gets into Git."""
    state: PromotionState
    """Requested: somebody has to merge. Committed: Git names it. Serving: it serves all traffic. Ended: it does not."""
    request: int = 0
    """Number of the request."""
    address: str = ""
    """Page of the request."""
    commit: str = ""
    """Commit that names it in Git."""
    seen: bool = False
    """Whether the Rollout has had it."""


class RetrainingStatus(StatusPart):
    """State of a `Retraining`."""

    phase: Phase | None = None
    """What is going on."""
    reason: str = ""
    """Why, in one word."""
    observed_generation: int = 0
    """Generation of the specification that this describes."""
    run_id: str = ""
    """Name of the run that is planned or active, or of the last one."""
    recipe_digest: str = ""
    """Digest of the recipe of that run."""
    recipe_commit: str = ""
    """Commit that the recipe was last read at; empty where it is not in Git."""
    plan: Plan | None = None
    """The run that waits to be started."""
    attempt: Attempt | None = None
    """The run that is being started or is active."""
    runs: list[PastRun] = Field(default_factory=list)
    """Runs that have ended, newest first."""
    stages: list[StageStatus] = Field(default_factory=list)
    """Stages of the run that `runId` names."""
    conditions: list[Condition] = Field(default_factory=list)
    """Judgements."""
    dataset: Dataset | None = None
    """The data set's folder."""
    consumed: Consumed = Field(default_factory=Consumed)
    """Triggers that runs have answered."""
    last_succeeded: datetime | None = None
    """When a run last succeeded."""
    wanted_since: datetime | None = None
    """Since when a run has been wanted and none has succeeded; absent where there is nothing to do."""
    gate: GateResult | None = None
    """Comparison of the newest run that has succeeded with the champion."""
    gate_rules: str = ""
    """Digest of the rules of that comparison."""
    promotion: PromotionStatus | None = None
    """The newest bundle that was promoted."""
    last_promoted: datetime | None = None
    """When a bundle of this object last came to serve all traffic."""

    def judge(self, kind: ConditionType, value: bool | None, reason: str, message: str, now: datetime) -> None:
        """Set a condition; None is unknown. The time stays as long as the judgement does."""
        status: Literal["True", "False", "Unknown"] = "Unknown" if value is None else "True" if value else "False"
        old = self.condition(kind)
        since = old.last_transition_time if old is not None and old.status == status else now
        new = Condition(type=kind, status=status, reason=reason, message=message, last_transition_time=since)
        if old is None:
            self.conditions = [*self.conditions, new]
        else:
            self.conditions = [new if each.type == kind else each for each in self.conditions]

    def forget(self, *kinds: ConditionType) -> None:
        """Remove conditions that are about an earlier run."""
        self.conditions = [each for each in self.conditions if each.type not in kinds]

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of a type, None without one."""
        return next((each for each in self.conditions if each.type == kind), None)

    def dump(self) -> dict[str, object]:
        """Plain values as the API server takes them."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
