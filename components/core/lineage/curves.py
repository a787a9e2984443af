"""Curves of metrics: the numbers that a stage reported while it ran, thinned and stored under the stage's key.

Events stay on the machine that wrote them. Curves are stored with the results, so that reports, and runs that take the
result from the store, find them on any machine.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from components.core.runtime.events import EventFile
from components.core.runtime.runner import events_path
from components.core.store.store import Store

MAX_POINTS = 400
"""Most points of a stored curve."""

Curve = dict[str, list[float]]
"""`step`, `value` and `time` (Unix seconds), of equal length."""


class Point(NamedTuple):
    """One value of a metric; `time` is Unix seconds."""

    metric: str
    step: int
    value: float
    time: float


def record_curves(store: Store, run: str) -> None:
    """Put the curves of a run's stages into the store, those that are not there yet."""
    for path in store.documents(f"runs/{run}/stages/"):
        stage = store.read_document_or_none(path)
        if stage is None or stage["cached"] or store.read_document_or_none(_path(stage["key"])) is not None:
            continue
        events = EventFile(events_path(store, run, stage["label"])).read()
        curves = curves_of_events(events_of_key(events, stage["key"]))
        if curves:
            store.put_document(_path(stage["key"]), curves)


def stage_curves(store: Store, key: str) -> dict[str, Curve]:
    """The curves of a finished stage by metric; empty where it reported none, or on another machine."""
    found: dict[str, Curve] = store.read_document_or_none(_path(key)) or {}
    return found


def curves_of_events(events: Iterable[Mapping[str, Any]], max_points: int = MAX_POINTS) -> dict[str, Curve]:
    """A curve for each metric of each phase; of a step that was repeated after a restart the last value counts."""
    found: dict[str, dict[int, Point]] = {}
    for point in points_of_events(events):
        found.setdefault(point.metric, {})[point.step] = point
    return {metric: _thinned(points, max_points) for metric, points in found.items()}


def points_of_events(events: Iterable[Mapping[str, Any]]) -> Iterator[Point]:
    """The values of metrics in their order; the name of a phase is part of the metric's name."""
    for event in events:
        for name, value in event.get("metrics", {}).items():
            metric = f"{event['what']}/{name}" if event["what"] else name
            yield Point(metric, event["done"], value, event["time"])


def points_of_curves(curves: Mapping[str, Curve]) -> Iterator[Point]:
    """The points of stored curves, one curve after the other."""
    for metric, curve in curves.items():
        for step, value, time in zip(curve["step"], curve["value"], curve["time"], strict=True):
            yield Point(metric, int(step), value, time)


def events_of_key(events: Iterable[Mapping[str, Any]], key: str) -> Iterator[Mapping[str, Any]]:
    """The events of the attempts at one computation; a run that was continued after a change holds others too."""
    wanted = False
    for event in events:
        if event["type"] == "start":
            wanted = event["key"] == key
        elif wanted:
            yield event


def _thinned(points: Mapping[int, Point], max_points: int) -> Curve:
    """At most `max_points` of the points, evenly spread, the first and the last among them."""
    chosen = [points[step] for step in _evenly(sorted(points), max_points)]
    return {
        "step": [float(point.step) for point in chosen],
        "value": [point.value for point in chosen],
        "time": [point.time for point in chosen],
    }


def _evenly(steps: Sequence[int], count: int) -> list[int]:
    if len(steps) <= count:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]


def _path(key: str) -> str:
    return f"curves/{key}.json"
