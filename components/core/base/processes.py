"""No process outlives the one that it works for, however that one ends; how processes start, and their memory."""

import contextlib
import gc
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

WATCH_INTERVAL_S = 0.5
STATUS = Path("/proc/self/status")
"""What the kernel says of this process."""


def on_exit_of(pid: int, act: Callable[[], None]) -> None:
    """Call `act` in a thread when a process has ended, however it ended.

    Asking the kernel for a signal (PR_SET_PDEATHSIG) would tie us to the thread that started us, not to the process,
    and reaches direct children alone.
    """

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(WATCH_INTERVAL_S)
        act()

    threading.Thread(target=watch, daemon=True).start()


def end_with_owner(owner: int) -> None:
    """Kill this process group as soon as the process `owner` has ended; it need not be our parent."""
    on_exit_of(owner, kill_own_group)


def kill_own_group() -> None:
    """End this process and its group at once."""
    os.killpg(os.getpgid(0), signal.SIGKILL)


def terminate_gracefully(grace_s: float) -> None:
    """Ask this process to save a checkpoint and leave; kill its group where it has not within `grace_s`."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    kill_own_group()


def end_trees(processes: Sequence["subprocess.Popen[bytes]"], grace_s: float) -> None:
    """Ask processes that lead their groups to leave, wait while they save, then kill the groups and all descendants.

    Each is asked once, since a second signal interrupts what it saves. Ctrl-C while it waits kills at once.
    """
    trees = [_descendants(process.pid) for process in processes]
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process, tree in zip(processes, trees, strict=True):
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(grace_s)
        tree += _descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for descendant in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        process.wait()
        psutil.wait_procs(tree, timeout=grace_s)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does, while the block runs."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Let Python collect no garbage while the block imports large libraries.

    They make millions of objects and no garbage; the collector takes a sixth of the time to find that out.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _descendants(pid: int) -> list[psutil.Process]:
    """Children of a process, their children and so on; none where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def peak_resident_bytes() -> int:
    """Largest resident set that this process, or one that it started and that has ended, has had.

    The kernel's file says it of this program alone. `getrusage` begins with what the process had that started it, so it
    is asked of the others, for which that is this one.
    """
    lines = STATUS.read_text(encoding="utf-8").splitlines() if STATUS.is_file() else []
    own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    if own is None:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
