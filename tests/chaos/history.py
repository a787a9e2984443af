"""Is the history of some attempts one of a store that loses nothing, does nothing twice and tears nothing?"""

import hashlib
import json
from itertools import pairwise
from typing import Any

from components.core.base.config import canonical_json
from components.core.runtime.events import read_event
from components.core.runtime.runner import events_path
from components.core.store.garbage_collection import collect_garbage
from components.core.store.store import Store
from components.core.store.verification import find_faults
from tests.chaos.attempt import LABEL, NO_GRACE_S, NUMBERS, RUN, Place

State = dict[str, Any]


def check_at_rest(place: Place) -> None:
    """After whatever happened: what was reported stored is whole, and nothing torn can be seen."""
    store = place.store
    for entry in place.ledger:
        if entry["what"] == "stored":
            store.verify(entry["digest"])
        if entry["what"] == "finished":
            record = store.stage_record(entry["key"])
            assert record is not None
            assert record.outputs == entry["outputs"]
    assert find_faults(store) == {}, find_faults(store)
    found = contents(store)
    for path, data in found.items():
        name = path.rpartition("/")[2]
        if path.startswith("blobs/"):
            assert hashlib.sha256(data).hexdigest() == name, path
        elif path.startswith("artifacts/"):
            assert hashlib.sha256(canonical_json(json.loads(data)).encode()).hexdigest() == name[:64], path
            for file in json.loads(data)["files"].values():
                assert f"blobs/sha256/{file['sha256'][:2]}/{file['sha256']}" in found, path
        elif path.endswith(".json"):
            json.loads(data)


def check_steps(place: Place) -> None:
    """A step is done again only where its resume point cannot have been whole, and none after the stage was finished.

    The stage reports a step, then saves a point: where the next step was reported, the point was whole.
    """
    attempts: dict[int, list[dict[str, Any]]] = {}
    for entry in place.ledger:
        attempts.setdefault(entry["pid"], []).append(entry)
    done: list[int] = []
    finished = False
    for entries in attempts.values():
        steps = [entry["step"] for entry in entries if entry["what"] == "step"]
        assert not (finished and steps), "a finished stage ran again"
        assert all(after == before + 1 for before, after in pairwise(steps)), steps
        if steps and done:
            assert done[-1] <= steps[0] <= done[-1] + 1, (done, steps)
        elif steps:
            assert steps[0] == 1, steps
        done += steps
        finished = finished or any(entry["what"] == "finished" for entry in entries)


def check_end(place: Place, expected: State) -> None:
    """All is as without a fault, down to what lies about after the clean-up, and the right sum came out."""
    last = [entry for entry in place.ledger if entry["what"] == "finished"][-1]
    assert last["result"] == {"total": sum(NUMBERS)}
    check_steps(place)
    found = state(place)
    assert found == expected, {key: (found[key], expected[key]) for key in found if found[key] != expected[key]}


def state(place: Place) -> State:
    """What is in the store and on this machine after a clean-up; times are left out."""
    store = place.store
    collect_garbage(store, grace_s=NO_GRACE_S)
    check_at_rest(place)
    objects: dict[str, Any] = {}
    for path, data in contents(store).items():
        if path.startswith(("stages/", "runs/")):
            document = json.loads(data)
            objects[path] = {
                name: document[name] for name in document if name in ("key", "outputs", "inputs", "result")
            }
        else:
            objects[path] = hashlib.sha256(data).hexdigest()
    events = [read_event(line) for line in events_path(store, RUN, LABEL).read_text().splitlines()]
    kept = sorted(path.name for path in (store.local / "artifacts").iterdir()) if objects else []
    left = sorted(path.name for folder in ("tmp", "resume") for path in _below(store, folder) if path.is_file())
    return {"objects": objects, "copies": kept, "left": left, "ended": bool(events)}


def contents(store: Store) -> dict[str, bytes]:
    """Every object of the store, by path."""
    found = {}
    for prefix in ("blobs/", "artifacts/", "stages/", "resume/", "runs/"):
        for listed in store.backend.list(prefix):
            data = store.backend.get(listed.path)
            if data is not None:
                found[listed.path] = data
    return found


def _below(store: Store, name: str) -> list[Any]:
    """What lies in a folder of this machine."""
    root = store.local / name if name == "tmp" or store.backend.folder is None else store.backend.folder / name
    return list(root.rglob("*"))
