"""A folder to work in that one process at a time has; what killed processes left goes when the next one comes."""

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
def workspace(parent: Path, name: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Have an empty folder for as long as the block lasts, and its name for oneself.

    The kernel lets go of the name when its process ends, however that ends.

    Args:
        parent: where the folder goes; leftovers in it are removed.
        name: of the folder.
        on_wait: called about ten times a second while another process has the name; may raise to give up.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    with _held(parent / f"{name}{_LOCK}", on_wait):
        folder = parent / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path, *, dry_run: bool = False) -> int:
    """Remove folders whose process has ended without doing so; returns how many there are."""
    found = 0
    for lock in parent.glob(f"*{_LOCK}"):
        with contextlib.suppress(_Taken), _held(lock, _give_up, keep=dry_run):
            folder = parent / lock.name.removesuffix(_LOCK)
            found += folder.exists()
            if not dry_run:
                shutil.rmtree(folder, ignore_errors=True)
    return found


@contextlib.contextmanager
def _held(lock: Path, on_wait: Callable[[], None], *, keep: bool = False) -> Iterator[None]:
    """Hold a lock file, which is removed afterwards if it is not to be kept."""
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
    """Lock a file; None where another process has it, or removed it in the meantime."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == lock.stat().st_ino:
            return handle
    os.close(handle)
    return None


class _Taken(Exception):
    """Another process has the name."""


def _give_up() -> None:
    raise _Taken
