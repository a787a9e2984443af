"""Locks of active runs, and the status of runs whose process was killed.

A command that is killed cannot record how its run ended. So each process that works on a run holds a lock on a file of
this machine, which the kernel releases when the process ends. A later command that gets the lock records the status.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from components.core.base.errors import StoreError
from components.core.store.store import Store
from pipelines.records.runs import end_run, run_record, run_records

MARK = "alive"


@contextlib.contextmanager
def hold_run_lock(store: Store, run: str) -> Iterator[None]:
    """Hold the lock of a run while the block runs; several processes may hold it together."""
    mark = _mark(store, run)
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        file.truncate(0)
        file.write(_attempt(run_record(store, run)["started"]))
        file.flush()
        yield


def mark_dead_runs_killed(store: Store) -> list[str]:
    """Record as `killed` the runs of this machine with the status `running` whose lock no process holds.

    Returns:
        Their names.
    """
    killed = []
    for record in run_records(store):
        run, mark = record["run"], _mark(store, record["run"])
        if record["status"] != "running" or not mark.exists():
            continue
        with mark.open("r+") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.read() == _attempt(record["started"]):
                end_run(store, run, "killed", finished=_last_sign(mark.parent))
                killed.append(run)
    return killed


def mark_dead_runs_where_allowed(store: Store) -> None:
    """Call `mark_dead_runs_killed`, except where this user may not write to the store."""
    with contextlib.suppress(StoreError, PermissionError):
        mark_dead_runs_killed(store)


def _attempt(started: float) -> str:
    """Identify one attempt at a run; another machine may have made the next."""
    return repr(started)


def _last_sign(folder: Path) -> float:
    """Time of the last change to the local files of a run, Unix time, s."""
    return max(os.stat(path).st_mtime for path in folder.iterdir())


def _mark(store: Store, run: str) -> Path:
    return store.local / "runs" / run / MARK
