"""Copies of the events of a stage in the store, so that another machine sees the progress of a pod, and its retry too.

A stage appends its events to a file of its own machine (`events.py`), which is lost with a pod. The copy is in parts
of equal size, of which only the last is written again: part N has the bytes from N * `PART_BYTES` on. So a reader
needs no state but the length of its own file. In a folder store the file itself is where all look for it.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from components.core.base.background import repeated
from components.core.base.errors import StoreError
from components.core.runtime.runner import events_path
from components.core.store.store import Store

PART_BYTES = 256 << 10
INTERVAL_S = 3.0
"""Time between two copies; a pod that is killed loses the events of this time."""


@contextlib.contextmanager
def mirrored_events(store: Store, run: str | None, label: str) -> "Iterator[EventMirror | None]":
    """Copy the events of a stage to an object store during the block, after those of earlier attempts were fetched.

    The block has the copier, None where the store is a folder.
    """
    if run is None or store.backend.folder is not None:
        yield None
        return
    path = events_path(store, run, label)
    fetch_events(store, run, path.stem)
    mirror = EventMirror(store, path, f"runs/{run}/events/{path.stem}")
    try:
        with repeated(mirror.copy, INTERVAL_S):  # a copy has the events of those that failed before
            yield mirror
    finally:
        try:
            mirror.copy()
        except StoreError as error:
            sys.stderr.write(f"the last events of {label} are on this machine alone: {error.message}\n")


def fetch_events(store: Store, run: str, name: str = "") -> None:
    """Bring the files of events of a run up to what the store has of them.

    Args:
        store: where other machines copied their events to.
        run: name of the run.
        name: stem of one file; all files of the run where it is empty.
    """
    if store.backend.folder is not None:
        return
    above = f"runs/{run}/events/"
    for part in store.backend.list(f"{above}{name}/" if name else above):  # sorted, so a file's parts are in order
        stem, _, number = part.path.removeprefix(above).rpartition("/")
        path = events_path(store, run, stem)
        begin, size = int(Path(number).stem) * PART_BYTES, path.stat().st_size if path.exists() else 0
        if not begin <= size < begin + part.size or (data := store.backend.get(part.path)) is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            stream.write(data[size - begin :])


class EventMirror:
    """Writes the parts of one file that are new or have grown.

    Attributes:
        synced_at: when the store last had the whole file, Unix time.
    """

    def __init__(self, store: Store, path: Path, folder: str) -> None:
        self._store, self._path, self._folder = store, path, folder
        self._copied = path.stat().st_size if path.exists() else 0
        self.synced_at = time.time()

    def copy(self) -> None:
        """Copy what was appended since the last call."""
        while self._path.exists() and (size := self._path.stat().st_size) > self._copied:
            number = self._copied // PART_BYTES
            end = min(size, (number + 1) * PART_BYTES)
            with self._path.open("rb") as stream:
                stream.seek(number * PART_BYTES)
                data = stream.read(end - number * PART_BYTES)
            self._store.backend.put(f"{self._folder}/{number:06d}.jsonl", data)
            self._copied = end
        self.synced_at = time.time()
