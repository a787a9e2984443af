from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from components.core.lineage.curves import curves_of_events, events_of_key, record_curves, stage_curves
from components.core.runtime.events import Events
from components.core.runtime.runner import events_path
from components.core.store.store import open_store


def progress(done: int, value: float, what: str = "", time: float = 0.0) -> dict[str, Any]:
    return {"type": "progress", "time": time, "done": done, "total": 9, "what": what, "metrics": {"loss": value}}


def test_a_metric_is_a_curve_and_a_phase_is_part_of_its_name() -> None:
    curves = curves_of_events([progress(1, 3.0, time=7.0), progress(2, 2.0, time=8.0), progress(1, 5.0, "library")])
    assert curves["loss"] == {"step": [1.0, 2.0], "value": [3.0, 2.0], "time": [7.0, 8.0]}
    assert curves["library/loss"]["value"] == [5.0]


def test_a_step_repeated_after_a_restart_counts_as_it_came_last() -> None:
    curves = curves_of_events([progress(1, 3.0), progress(2, 2.0), progress(2, 1.5), progress(3, 1.0)])
    assert curves["loss"]["step"] == [1.0, 2.0, 3.0]
    assert curves["loss"]["value"] == [3.0, 1.5, 1.0]


@given(steps=st.lists(st.integers(1, 10_000), min_size=1, max_size=300, unique=True), limit=st.integers(2, 50))
def test_thinning_keeps_order_ends_and_the_limit(steps: list[int], limit: int) -> None:
    curve = curves_of_events([progress(step, float(-step)) for step in steps], max_points=limit)["loss"]
    assert len(curve["step"]) == min(limit, len(steps))
    assert curve["step"] == sorted(set(curve["step"]))
    assert (curve["step"][0], curve["step"][-1]) == (min(steps), max(steps))
    assert curve["value"] == [-step for step in curve["step"]]


def test_only_attempts_at_the_computation_itself_count() -> None:
    starts = [{"type": "start", "key": key} for key in ("old", "new", "new")]
    events = [starts[0], progress(1, 9.0), starts[1], progress(1, 3.0), starts[2], progress(2, 2.0)]
    assert curves_of_events(events_of_key(events, "new"))["loss"]["value"] == [3.0, 2.0]


def test_recorded_curves_are_found_by_the_key_of_the_stage(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for label, cached in (("sft", False), ("search/costs", True)):
        store.put_document(
            f"runs/r/stages/{label}.json", {"label": label, "key": f"key of {label[:3]}", "cached": cached}
        )
        events = Events(events_path(store, "r", label))
        events.emit({"type": "start", "time": 0.0, "key": f"key of {label[:3]}"})
        events.emit(progress(1, 3.0))
    with events_path(store, "r", "sft").open("a") as stream:
        stream.write('{"type": "progress", "cut off')
        stream.write('{"type": "progress"}\n')  # what came after it on the same line is lost with it
    record_curves(store, "r")
    assert stage_curves(open_store(tmp_path), "key of sft")["loss"]["value"] == [3.0]
    assert stage_curves(store, "key of sea") == {}
