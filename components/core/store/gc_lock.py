"""Lock between writers and garbage collection of one store, across processes and machines.

    writing/<marker>          a writer is active: its artifacts may have no reference yet
    collecting/<marker>       garbage collection is active

Each writes its own marker first and lists the other kind afterwards, so that at least one of them finds the other. A
writer that finds a collector waits for its end. A collector that finds a writer removes its marker and tries again.
Several writers may be active at the same time.

A thread renews the collector's marker while it lists, reads and removes: each can take longer than the age from
which a marker is stale. A collector that could not renew it in time (its machine slept, say) removes nothing more.
"""

import contextlib
import math
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from components.core.base.background import repeated
from components.core.base.errors import StoreError
from components.core.store.object_store import ObjectStore

WRITERS, COLLECTORS = "writing/", "collecting/"
STALE_S = {WRITERS: 24 * 3600.0, COLLECTORS: 120.0}
"""Age from which a marker of another machine is treated as one of a killed process, s."""
RENEW_S = 20.0
"""Time between two renewals of a collector's marker, s."""
POLL_S = 0.1


class Marker:
    """A marker of this process in the store."""

    def __init__(self, backend: ObjectStore, prefix: str) -> None:
        self._backend = backend
        self._path = f"{prefix}{uuid.uuid4().hex}.{_process(os.getpid())}"
        self._written = time.monotonic()
        self._valid_until = math.inf  # until it was written once: where no space is left, no writer can start either

    def write(self) -> None:
        """Write the marker, or write it again."""
        began = time.time()
        self._backend.put(self._path, b"")
        self._written = time.monotonic()
        self._valid_until = began + STALE_S[COLLECTORS]

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """While in scope, a thread writes the marker again every `RENEW_S`."""
        with repeated(self.write, RENEW_S):
            yield

    def require_valid(self) -> None:
        """To be called before each removal.

        Raises:
            StoreError: the marker was not renewed for so long that writers ignore it.
        """
        if time.time() > self._valid_until:
            raise StoreError(
                f"the marker of this clean-up is older than {STALE_S[COLLECTORS]:g} s, so writers may be at work: "
                "nothing more is removed",
                hint="start the clean-up again; it could not reach the store, or its machine slept",
            )

    def remove(self) -> None:
        """Remove the marker. An unreachable server is ignored: the work before it succeeded."""
        with contextlib.suppress(StoreError):
            self._backend.delete(self._path)

    @property
    def now(self) -> float:
        """Unix time of the store's own clock, s; clocks of machines differ."""
        found = self._backend.stat(self._path)
        return (time.time() if found is None else found.modified) + time.monotonic() - self._written

    def others(self, prefix: str) -> list[str]:
        """Markers of processes that may be alive; markers of dead processes are removed."""
        alive = []
        for found in list(self._backend.list(prefix)):
            if _has_ended(found.path) or self.now - found.modified > STALE_S[prefix]:
                self._backend.delete(found.path)
            else:
                alive.append(found.path)
        return alive


@contextlib.contextmanager
def writing(backend: ObjectStore) -> Iterator[None]:
    """Exclude garbage collection; waits for an active one to end."""
    marker = Marker(backend, WRITERS)
    marker.write()
    try:
        while marker.others(COLLECTORS):
            time.sleep(POLL_S)
        yield
    finally:
        marker.remove()


@contextlib.contextmanager
def collecting(backend: ObjectStore, wait_s: float) -> Iterator[Marker]:
    """Exclude writers.

    Args:
        backend: objects of the store.
        wait_s: how long to wait for writers to finish, s.

    Raises:
        StoreError: writers were still active; names one.
    """
    deadline = time.monotonic() + wait_s
    while True:
        marker = Marker(backend, COLLECTORS)
        with contextlib.suppress(StoreError):  # no space left: no writer can start either, and collection frees space
            marker.write()
        try:
            writers = marker.others(WRITERS)
            if not writers:
                with marker.renewed():
                    yield marker
                return
        finally:
            marker.remove()
        if time.monotonic() > deadline:
            raise StoreError(
                f"a writer is at work in the store: {writers[0]}",
                hint="try again when it has finished; if it was killed on another machine, remove this file",
            )
        time.sleep(POLL_S)


def _has_ended(path: str) -> bool:
    """Whether a marker is from a process of this machine that has ended."""
    process = path.partition(".")[2]
    host, _, rest = process.partition(".")
    pid = rest.partition(".")[0]
    return host == _host() and pid.isdigit() and process != _process(int(pid))


def _process(pid: int) -> str:
    """Unique name of a process: machine, id and start time; without the start time once it has ended."""
    started = ""
    with contextlib.suppress(OSError, ValueError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = "" if state == "Z" else fields[18]
    return f"{_host()}.{pid}.{started}"


def _host() -> str:
    """This machine's name without `.` and `/`, which separate the parts of a marker."""
    return socket.gethostname().replace(".", "-").replace("/", "-")
