"""Events of a pod, as other machines and the pod's retry see them."""

from pathlib import Path

import pytest

from components.core.base.errors import StoreError
from components.core.runtime import event_mirror
from components.core.runtime.event_mirror import fetch_events, mirrored_events
from components.core.runtime.events import EventFile, Events
from components.core.runtime.runner import events_path
from components.core.store.store import Store, open_store
from tests.waiting import wait_until


@pytest.fixture
def machines(s3_uri: str, tmp_path: Path) -> list[Store]:
    return [open_store(s3_uri, local=tmp_path / name) for name in ("pod", "retry", "laptop")]


def numbers(store: Store) -> list[int]:
    return [event["number"] for event in EventFile(events_path(store, "run-1", "search/library-0")).read()]


@pytest.mark.parametrize("part_bytes", [7, 64, 1 << 20])
def test_a_retry_appends_to_the_events_of_the_lost_pod_and_a_laptop_reads_both(
    machines: list[Store], monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(event_mirror, "PART_BYTES", part_bytes)
    pod, retry, laptop = machines
    for store, several in ((pod, range(5)), (retry, range(5, 9))):
        with mirrored_events(store, "run-1", "search/library-0"):
            events = Events(events_path(store, "run-1", "search/library-0"))
            for number in several:
                events.emit({"type": "note", "number": number})
        fetch_events(laptop, "run-1")
        assert numbers(laptop) == numbers(store)
    assert numbers(laptop) == list(range(9))


def test_events_are_seen_while_the_stage_works(machines: list[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_mirror, "INTERVAL_S", 0.01)
    pod, _, laptop = machines
    path = events_path(laptop, "run-1", "search/library-0")

    def arrived() -> bool:
        fetch_events(laptop, "run-1")
        return path.exists()

    with mirrored_events(pod, "run-1", "search/library-0"):
        Events(events_path(pod, "run-1", "search/library-0")).emit({"type": "note", "number": 3})
        wait_until("the events", arrived)
        assert numbers(laptop) == [3]


def test_the_time_at_which_the_store_had_all_events_stays_while_it_does_not_answer(
    machines: list[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = machines[0]

    def refuse(path: str, data: bytes) -> None:
        raise StoreError("the store does not answer")

    with mirrored_events(pod, "run-1", "data") as mirror:
        assert mirror is not None
        mirror.copy()
        before = mirror.synced_at
        Events(events_path(pod, "run-1", "data")).emit({"type": "note", "number": 1})
        with monkeypatch.context() as patched:
            patched.setattr(pod.backend, "put", refuse)
            with pytest.raises(StoreError):
                mirror.copy()
            assert mirror.synced_at == before
        mirror.copy()
        assert mirror.synced_at > before


def test_a_folder_has_the_events_already(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with mirrored_events(store, "run-1", "data") as mirror:
        assert mirror is None
    fetch_events(store, "run-1")
    assert store.documents("runs/run-1/events/") == []
