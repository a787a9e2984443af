"""Curves of metrics: what a stage reported while it ran, thinned out and kept in the store under the stage's key.

Events stay on the machine that wrote them; curves go where the results go, so that whoever reads a result finds
its curves.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.core.runtime.events import read_event
from components.core.runtime.runner import events_path
from components.core.store.store import Store

MAX_POINTS = 400
"""Points kept of a curve."""

Curve = dict[str, list[float]]
"""`step`, `value` and `time` (Unix seconds), of equal length."""


def record_curves(store: Store, run: str) -> None:
    """Put the curves of a run's stages into the store, those that are not there yet."""
    for path in store.documents(f"runs/{run}/stages/"):
        stage = store.read_document_or_none(path)
        if stage is None or stage["cached"] or store.read_document_or_none(_path(stage["key"])) is not None:
            continue
        events = read_events(events_path(store, run, stage["label"]))
        curves = curves_of_events(events_of_key(events, stage["key"]))
        if curves:
            store.put_document(_path(stage["key"]), curves)


def stage_curves(store: Store, key: str) -> dict[str, Curve]:
    """The curves of a finished stage by metric; empty where it reported none, or on another machine."""
    found: dict[str, Curve] = store.read_document_or_none(_path(key)) or {}
    return found


def curves_of_events(events: Iterable[Mapping[str, Any]], max_points: int = MAX_POINTS) -> dict[str, Curve]:
    """A curve for each metric of each phase; a step that was repeated after a restart counts as it came last."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for event in events:
        for name, value in event.get("metrics", {}).items():
            metric = f"{event['what']}/{name}" if event["what"] else name
            found.setdefault(metric, {})[event["done"]] = (value, event["time"])
    return {metric: _thinned(points, max_points) for metric, points in found.items()}


def events_of_key(events: Iterable[Mapping[str, Any]], key: str) -> Iterator[Mapping[str, Any]]:
    """The events of the attempts at one computation; a run that was continued after a change holds others too."""
    wanted = False
    for event in events:
        if event["type"] == "start":
            wanted = event["key"] == key
        elif wanted:
            yield event


def read_events(path: Path) -> list[dict[str, Any]]:
    """Events of a file, none where there is no file; lines that were cut off are left out."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as stream:
        return [event for line in stream if line.endswith("\n") and (event := read_event(line)) is not None]


def _thinned(points: Mapping[int, tuple[float, float]], max_points: int) -> Curve:
    """At most `max_points` of the points, evenly spread, the first and the last among them."""
    steps = _evenly(sorted(points), max_points)
    return {
        "step": [float(step) for step in steps],
        "value": [points[step][0] for step in steps],
        "time": [points[step][1] for step in steps],
    }


def _evenly(steps: Sequence[int], count: int) -> list[int]:
    if len(steps) <= count:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]


def _path(key: str) -> str:
    return f"curves/{key}.json"
