"""One attempt at a tiny run, in a process of its own that can be killed at any point; what it did is in a ledger.

The ledger is written with one system call a line, outside the store, so that it tells what happened whatever becomes
of the process.
"""

import functools
import json
import multiprocessing
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from components.core.base import fault_injection as faults
from components.core.base.errors import TesseraError
from components.core.runtime.context import Interrupted
from components.core.runtime.events import Events
from components.core.runtime.placement import Placement
from components.core.runtime.runner import events_path, run_stage, stage_key
from components.core.store.garbage_collection import collect_garbage
from components.core.store.object_store import ObjectStore
from components.core.store.store import Store, open_object_store, open_store
from tests.components.core.base.fault_points import POINTS
from tests.components.core.fake_stage import STAGE, FakeConfig, numbers_folder
from tests.waiting import PATIENCE_S

NUMBERS = (1, 2, 4)
TIMEOUT_S = PATIENCE_S
CLEAN_UP_WAIT_S = 5.0
"""A marker whose removal failed makes the clean-up of the same attempt wait so long for a writer."""
RUN, LABEL = "tiny-1", "tiny"
FAILED, INTERRUPTED = 1, 130
NO_GRACE_S = -60.0
"""Has a clean-up take what is as young as can be."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.chaos.attempt", "minio", "urllib3"])


@dataclass(frozen=True)
class Place:
    """Where attempts at one run work."""

    uri: str
    folder: Path
    """Of this machine: working copies, ledger, sources."""
    environment: Mapping[str, str]
    machine: str = "here"
    """Attempts on another machine share nothing but a remote store."""

    @property
    def store(self) -> Store:
        """The store, with nothing in memory but its connections."""
        local = None if "://" not in self.uri else self.folder / self.machine
        store = open_store(self.uri, local=local)
        store.backend = _backend(self.uri)
        return store

    @property
    def go_on(self) -> Path:
        """The file without which an attempt that is held waits after each step."""
        return self.folder / "go-on"

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """What all attempts did, in order."""
        path = self.folder / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def note(self, what: str, **facts: object) -> None:
        """Add to the ledger."""
        handle = os.open(self.folder / "ledger.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, json.dumps({"pid": os.getpid(), "what": what, **facts}).encode() + b"\n")
        os.close(handle)


@functools.lru_cache(maxsize=8)
def _backend(uri: str) -> ObjectStore:
    return open_object_store(uri)


def begin(place: Place, fault: str | None = None, *, clean: bool = False, held: bool = False) -> BaseProcess:
    """Start an attempt.

    Args:
        place: where it works.
        fault: an order for `components.core.base.fault_injection`.
        clean: whether it cleans the store up in the end.
        held: whether it waits after each step until `place.go_on` is there.
    """
    assert fault in (None, "count") or re.split("[:=]", str(fault))[0] in POINTS, f"no such point: {fault}"
    process = CONTEXT.Process(target=_attempt, args=(place, fault, clean, held))
    process.start()
    return process


def attempt(place: Place, fault: str | None = None, *, clean: bool = False) -> int:
    """Make an attempt; returns its exit code, negative for a signal."""
    process = begin(place, fault, clean=clean)
    process.join(TIMEOUT_S)
    assert process.exitcode is not None, "the attempt hangs"
    return process.exitcode


def _attempt(place: Place, fault: str | None, clean: bool, held: bool) -> None:
    os.environ.update(place.environment)
    os.environ.pop(faults.VARIABLE, None)
    if fault is not None:
        os.environ[faults.VARIABLE] = fault
    try:
        tiny_run(place, clean, held)
    except (TesseraError, OSError) as error:
        place.note("failed", error=f"{type(error).__name__}: {error}")
        os._exit(FAILED)
    except Interrupted:
        os._exit(INTERRUPTED)
    finally:
        place.note("reached", points=faults.reached())


def tiny_run(place: Place, clean: bool, held: bool) -> None:
    """Store what is read, store what nobody needs, compute, clean up."""
    store = place.store
    place.note("begun")
    own = place.folder / f"of-{os.getpid()}"  # attempts at once write no file that another one is storing
    numbers = store.put_folder(numbers_folder(own / "numbers", *NUMBERS), "data").digest
    place.note("stored", digest=numbers)
    store.put_folder(numbers_folder(own / "garbage", 0), "data")
    inputs = {"numbers": numbers}
    reporter = _Ledger(place, Events(events_path(store, RUN, LABEL)), held)
    options: dict[str, Any] = {"label": LABEL, "run": RUN, "placement": Placement(threads=1), "reporter": reporter}
    record = run_stage(STAGE, FakeConfig(), inputs, store=store, **options)
    for digest in record.outputs.values():
        place.note("stored", digest=digest)
    place.note("finished", key=record.key, outputs=record.outputs, result=record.result)
    if clean:
        collect_garbage(store, grace_s=NO_GRACE_S, wait_s=CLEAN_UP_WAIT_S)


def key_of(numbers: str) -> str:
    """The key of the tiny computation."""
    return stage_key(STAGE, FakeConfig(), {"numbers": numbers})


class _Ledger:
    """Passes events on, and keeps the steps: the side effects of the stage."""

    def __init__(self, place: Place, events: Events, held: bool) -> None:
        self._place, self._events, self._held = place, events, held

    def emit(self, event: Mapping[str, object]) -> None:
        """Take one event."""
        self._events.emit(event)
        if event["type"] == "progress":
            self._place.note("step", step=event["done"])
            while self._held and not self._place.go_on.exists():
                time.sleep(0.01)
