"""Which trigger asks for a run now."""

from dataclasses import dataclass
from datetime import datetime

from cronsim import CronSim, CronSimError

from components.core.base.errors import InputError
from pipelines.retraining.cluster import Retraining
from pipelines.retraining.spec import NOW, RetrainingSpec
from pipelines.retraining.status import Consumed, TriggerName


@dataclass(frozen=True)
class Due:
    """What asks for a run.

    Attributes:
        trigger: the first of those that ask.
        answers: all that the run would answer.
        even_unchanged: whether a person wants it although nothing has changed.
    """

    trigger: TriggerName
    answers: Consumed
    even_unchanged: bool = False


def find_due(found: Retraining, spec: RetrainingSpec, identity: str, now: datetime) -> Due | None:
    """The trigger that asks for a run, None without one. All that ask at the same time are answered by one run.

    Args:
        found: the object.
        spec: its specification.
        identity: of the run that is wanted now, with the newest quiet data set in it.
        now: the present time.

    Raises:
        InputError: the schedule is not one.
    """
    status, consumed = found.status, found.status.consumed
    answers = newest_triggers(found, spec, now)
    last = status.runs[0] if status.runs else None
    has_changed = last is None or last.identity != identity
    due: list[TriggerName] = []
    if answers.now != consumed.now:
        due.append("now")
    if has_changed and answers.dataset != consumed.dataset:
        due.append("dataset")
    if has_changed and spec.trigger.on_change:
        due.append("onChange")
    if answers.schedule != consumed.schedule and (last is None or has_changed or last.state != "Succeeded"):
        due.append("schedule")
    return Due(due[0], answers, even_unchanged=due[0] == "now") if due else None


def newest_triggers(found: Retraining, spec: RetrainingSpec, now: datetime) -> Consumed:
    """The newest of each trigger, whether a run has answered it or not."""
    consumed, dataset = found.status.consumed, found.status.dataset
    latest = consumed.schedule
    if spec.trigger.schedule is not None:
        fired = last_time(spec.trigger.schedule, now)
        latest = fired if fired > found.created else latest
    return Consumed(
        schedule=latest,
        now=found.annotations.get(NOW, ""),
        dataset=dataset.artifact_of if dataset is not None and spec.trigger.dataset is not None else consumed.dataset,
    )


def last_time(schedule: str, now: datetime) -> datetime:
    """The last time of a schedule before now.

    Raises:
        InputError: it is not a schedule.
    """
    try:
        return next(CronSim(schedule, now, reverse=True))
    except (CronSimError, StopIteration) as error:
        raise InputError(
            f"trigger.schedule {schedule!r} is not a time: {error}", hint='five fields of cron, such as "0 3 * * 1"'
        ) from None
