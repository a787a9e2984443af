"""Which runs are worked on: a command that is killed cannot write how its run ended, so others find out.

Whoever works on a run holds a lock on a file of this machine, which the kernel lets go of however the process ends.
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
    """Have a run marked as worked on as long as the block lasts; several processes may."""
    mark = _mark(store, run)
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        file.truncate(0)
        file.write(_attempt(run_record(store, run)["started"]))
        file.flush()
        yield


def mark_dead_runs_killed(store: Store) -> list[str]:
    """Record as `killed` the runs of this machine that say they are running and on which nobody works.

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
    """The same for a reader, who may lack the right to write."""
    with contextlib.suppress(StoreError, PermissionError):
        mark_dead_runs_killed(store)


def _attempt(started: float) -> str:
    """Tells one attempt at a run from the next, which another machine may have made."""
    return repr(started)


def _last_sign(folder: Path) -> float:
    """When anything of a run was last written here, Unix time, s."""
    return max(os.stat(path).st_mtime for path in folder.iterdir())


def _mark(store: Store, run: str) -> Path:
    return store.local / "runs" / run / MARK
