"""Scratch folders, each used by one process at a time.

A folder that a killed process left behind is removed when the next scratch folder is made.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_S = 0.1
_LOCK = ".lock"


@contextlib.contextmanager
def scratch_dir(parent: Path, name: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Make an empty folder, lock its name, and remove the folder at the end of the block.

    The kernel releases the lock when the process ends, also after `kill -9`.

    Args:
        parent: where the folder goes; leftovers in it are removed.
        name: of the folder.
        on_wait: called about ten times a second while another process holds the lock; may raise to give up.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    with _locked(parent / f"{name}{_LOCK}", on_wait):
        folder = parent / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path, *, dry_run: bool = False) -> int:
    """Remove the folders of processes that have ended; returns how many there are."""
    found = 0
    for lock in parent.glob(f"*{_LOCK}"):
        with contextlib.suppress(_Taken), _locked(lock, _give_up, keep=dry_run):
            folder = parent / lock.name.removesuffix(_LOCK)
            found += folder.exists()
            if not dry_run:
                shutil.rmtree(folder, ignore_errors=True)
    return found


@contextlib.contextmanager
def _locked(lock: Path, on_wait: Callable[[], None], *, keep: bool = False) -> Iterator[None]:
    """Lock a file; it is removed at the end of the block unless `keep` is set."""
    while (handle := _try(lock)) is None:
        on_wait()
        time.sleep(POLL_S)
    try:
        yield
    finally:
        if not keep:
            lock.unlink(missing_ok=True)
        os.close(handle)


def _try(lock: Path) -> int | None:
    """Lock a file; None where another process has locked it, or has removed it in the meantime."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == lock.stat().st_ino:
            return handle
    os.close(handle)
    return None


class _Taken(Exception):
    """Another process holds the lock."""


def _give_up() -> None:
    raise _Taken
