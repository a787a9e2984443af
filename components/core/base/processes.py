"""No process outlives the one that it works for, however that one ends."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

WATCH_INTERVAL_S = 0.5


def end_with_parent(parent: int) -> None:
    """Kill this process group as soon as `parent` is no longer our parent.

    Asking the kernel for a signal (PR_SET_PDEATHSIG) would tie us to the thread that started us, not to the process.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_INTERVAL_S)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_with_owner(owner: int) -> None:
    """Kill this process group as soon as the process `owner` has ended; it need not be our parent."""
    try:
        end_of_owner = os.pidfd_open(owner)
    except ProcessLookupError:
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def watch() -> None:
        select.select([end_of_owner], [], [])
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def on_stdin_eof(act: Callable[[], None]) -> None:
    """Do something when the process that holds the other end of our standard input, a pipe, has ended.

    Processes in between that inherit the pipe's end to read from do not keep it open, so that it reaches through them.
    """

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            continue
        act()

    threading.Thread(target=watch, daemon=True).start()


def terminate_gracefully(grace_s: float) -> None:
    """Ask this process to save what it needs and leave; end it where it has not within `grace_s`."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


def group_pids(group: int) -> list[int]:
    """Processes of a group that have not ended; those that nobody has waited for yet have."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found
