"""Alerts of an Alertmanager as triggers, against a stand-in that takes the parameters of its published interface."""

from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.promotion.platform_settings import OperatorSettings
from tests.json_server import Request, running_json_server
from tests.pipelines.retraining.world import World, condition

PARAMETERS = {"active", "silenced", "inhibited", "unprocessed", "filter", "receiver"}


class Alertmanager:
    """The stand-in: alerts that fire, by name and time."""

    def __init__(self) -> None:
        self.firing: list[tuple[str, str]] = []
        self.status = 200
        self.queries: list[dict[str, str]] = []

    def answer(self, request: Request) -> tuple[int, Any]:
        assert (request.method, request.path) == ("GET", "/api/v2/alerts")
        assert request.query.keys() <= PARAMETERS
        self.queries.append(request.query)
        return self.status, [
            {"labels": {"alertname": name}, "startsAt": since, "status": {"state": "active"}}
            for name, since in self.firing
        ]


@pytest.fixture
def alertmanager(world: World) -> Iterator[Alertmanager]:
    found = Alertmanager()
    with running_json_server(found.answer) as url:
        world.settings = OperatorSettings(alertmanager=url)
        yield found


def test_an_alert_runs_what_has_changed_once_each_time_that_it_fires(world: World, alertmanager: Alertmanager) -> None:
    world.create(trigger={"onChange": False, "alerts": ["EvalDrift", "Other"]})
    assert world.step().reason == "NoTrigger"
    assert alertmanager.queries[-1]["filter"] == 'alertname=~"EvalDrift|Other"'
    assert alertmanager.queries[-1]["silenced"] == "false"
    alertmanager.firing = [("EvalDrift", "2026-03-02T12:00:00.5Z"), ("Unasked", "2026-03-02T13:00:00Z")]
    assert world.step().reason == "alert"
    world.end()
    status = world.step()
    assert status.consumed.alert is not None
    assert status.consumed.alert.hour == 12
    world.change_recipe(seed=9)
    assert world.step(hours=1).phase == "Ready"  # the same alert was answered
    alertmanager.firing = [("EvalDrift", "2026-03-03T12:00:00Z")]
    assert world.step().reason == "alert"
    world.end()
    world.step()
    alertmanager.firing = [("EvalDrift", "2026-03-04T12:00:00Z")]
    assert world.step().phase == "Ready"  # nothing has changed: the result would be the same
    world.change_recipe(seed=10)
    assert world.step().reason == "alert"
    assert len(world.started) == 3


def test_without_an_answer_the_other_triggers_go_on(world: World, alertmanager: Alertmanager) -> None:
    alertmanager.status = 503
    world.create(trigger={"alerts": ["EvalDrift"]})
    status = world.step()
    assert status.reason == "onChange"
    assert condition(status, "Ready")[:2] == ("True", "AlertsUnknown")
    assert "gives no alerts" in condition(status, "Ready")[2]


def test_alerts_need_an_alertmanager(world: World) -> None:
    world.create(trigger={"alerts": ["EvalDrift"]})
    status = world.step()
    assert (status.phase, status.reason) == ("Invalid", "InputError")
    assert "operator.alertmanager" in condition(status, "Ready")[2]
