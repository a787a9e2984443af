"""Writers and clean-ups of one store keep out of each other's way, across processes and machines.

    writing/<marker>          a writer is at work: what it stored may not be referred to yet
    collecting/<marker>       a clean-up is deleting

Each announces itself first and looks for the other afterwards, so that at least one of them sees the other. A writer
that sees a clean-up waits for its end; a clean-up that sees a writer withdraws and tries again. Many may write at once.
"""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from components.core.base.errors import StoreError
from components.core.store.object_store import ObjectStore

WRITERS, COLLECTORS = "writing/", "collecting/"
STALE_S = {WRITERS: 24 * 3600.0, COLLECTORS: 120.0}
"""Age from which a marker of another machine counts as left behind by a process that was killed, s."""
RENEW_S = 20.0
"""Time after which a clean-up that goes on renews its marker, s."""
POLL_S = 0.1


class Marker:
    """The announcement of this process."""

    def __init__(self, backend: ObjectStore, prefix: str) -> None:
        self._backend = backend
        self._path = f"{prefix}{uuid.uuid4().hex}.{_process(os.getpid())}"
        self._written = time.monotonic()

    def announce(self) -> None:
        """Write the marker."""
        self._backend.put(self._path, b"")
        self._written = time.monotonic()

    def keep(self) -> None:
        """Renew the marker where that is due; to be called between long steps."""
        if time.monotonic() - self._written > RENEW_S:
            with contextlib.suppress(StoreError):
                self.announce()

    def remove(self) -> None:
        """Take the announcement back; a server that is away just now must not spoil what was done."""
        with contextlib.suppress(StoreError):
            self._backend.delete(self._path)

    @property
    def now(self) -> float:
        """Time by the store's own clock, Unix, s; clocks of machines differ."""
        found = self._backend.stat(self._path)
        return (time.time() if found is None else found.modified) + time.monotonic() - self._written

    def others(self, prefix: str) -> list[str]:
        """Markers of processes that may be alive; those that were left behind are removed."""
        alive = []
        for found in list(self._backend.list(prefix)):
            if _has_ended(found.path) or self.now - found.modified > STALE_S[prefix]:
                self._backend.delete(found.path)
            else:
                alive.append(found.path)
        return alive


@contextlib.contextmanager
def writing(backend: ObjectStore) -> Iterator[None]:
    """Announce a writer, and wait for a clean-up that is at work."""
    marker = Marker(backend, WRITERS)
    marker.announce()
    try:
        while marker.others(COLLECTORS):
            time.sleep(POLL_S)
        yield
    finally:
        marker.remove()


@contextlib.contextmanager
def collecting(backend: ObjectStore, wait_s: float) -> Iterator[Marker]:
    """Have no writer at work.

    Args:
        backend: the store's.
        wait_s: how long to wait for writers to finish, s.

    Raises:
        StoreError: writers were still at work; names one.
    """
    patience = time.monotonic() + wait_s
    while True:
        marker = Marker(backend, COLLECTORS)
        with contextlib.suppress(StoreError):  # no space left: no writer can begin either, and this is the way out
            marker.announce()
        try:
            writers = marker.others(WRITERS)
            if not writers:
                yield marker
                return
        finally:
            marker.remove()
        if time.monotonic() > patience:
            raise StoreError(
                f"a writer is at work in the store: {writers[0]}",
                hint="try again when it has finished; if it was killed on another machine, remove this file",
            )
        time.sleep(POLL_S)


def _has_ended(path: str) -> bool:
    """Whether a marker's process was one of this machine, and is no more."""
    process = path.partition(".")[2]
    host, _, rest = process.partition(".")
    pid = rest.partition(".")[0]
    return host == _host() and pid.isdigit() and process != _process(int(pid))


def _process(pid: int) -> str:
    """Name of a process that no other ever has: machine, id, and when it started; the last is missing once it ended."""
    started = ""
    with contextlib.suppress(OSError, ValueError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = "" if state == "Z" else fields[18]
    return f"{_host()}.{pid}.{started}"


def _host() -> str:
    """This machine's name, without what parts a marker."""
    return socket.gethostname().replace(".", "-").replace("/", "-")
