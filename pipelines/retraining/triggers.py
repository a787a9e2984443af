"""Which trigger asks for a run now."""

import json
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlencode

from cronsim import CronSim, CronSimError

from components.core.base.errors import ClusterError, InputError
from pipelines.retraining.cluster import Retraining
from pipelines.retraining.spec import NOW, RetrainingSpec
from pipelines.retraining.status import Consumed, TriggerName

ALERTS_TIMEOUT_S = 10.0


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


def find_due(
    found: Retraining, spec: RetrainingSpec, identity: str, now: datetime, firing: datetime | None = None
) -> Due | None:
    """The trigger that asks for a run, None without one. All that ask at the same time are answered by one run.

    Args:
        found: the object.
        spec: its specification.
        identity: of the run that is wanted now, with the newest quiet data set in it.
        now: the present time.
        firing: since when the newest alert fires; None without one.

    Raises:
        InputError: the schedule is not one.
    """
    status, consumed = found.status, found.status.consumed
    answers = newest_triggers(found, spec, now, firing)
    last = status.runs[0] if status.runs else None
    has_changed = last is None or last.identity != identity
    due: list[TriggerName] = []
    if answers.now != consumed.now:
        due.append("now")
    if has_changed and answers.dataset != consumed.dataset:
        due.append("dataset")
    if has_changed and spec.trigger.on_change:
        due.append("onChange")
    can_change = has_changed or last is None or last.state != "Succeeded"
    if answers.alert != consumed.alert and can_change:
        due.append("alert")
    if answers.schedule != consumed.schedule and can_change:
        due.append("schedule")
    return Due(due[0], answers, even_unchanged=due[0] == "now") if due else None


def newest_triggers(found: Retraining, spec: RetrainingSpec, now: datetime, firing: datetime | None = None) -> Consumed:
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
        alert=firing or consumed.alert,
    )


def firing_since(alertmanager: str | None, names: Sequence[str]) -> datetime | None:
    """Since when the newest alert of some names fires, as Alertmanager knows it; None where none fires.

    Silenced and inhibited alerts do not count.

    Raises:
        InputError: no Alertmanager is configured.
        ClusterError: it does not answer.
    """
    if alertmanager is None:
        raise InputError(
            "trigger.alerts needs an Alertmanager, and the operator knows none",
            hint="set operator.alertmanager of the chart",
        )
    query = [("active", "true"), ("silenced", "false"), ("inhibited", "false")]
    query.append(("filter", f'alertname=~"{"|".join(map(re.escape, names))}"'))
    url = f"{alertmanager.rstrip('/')}/api/v2/alerts?{urlencode(query)}"
    try:
        with urllib.request.urlopen(url, timeout=ALERTS_TIMEOUT_S) as answer:
            alerts = json.loads(answer.read())
        times = [datetime.fromisoformat(each["startsAt"]) for each in alerts if each["labels"]["alertname"] in names]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ClusterError(f"the Alertmanager at {alertmanager} gives no alerts: {error}") from None
    return max(times, default=None)


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
