"""Compares formulas with math-verify in worker processes that a limit of processor time ends.

math-verify has no time limit outside the main thread, and some formulas keep it busy for hours. So it runs in processes
of its own. The kernel ends a process that uses more processor time than one comparison may take, even inside native
code and even after its owner has ended; the next comparison starts a new one. The limit counts processor time, so that
a busy machine does not change what is right.
"""

import contextlib
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading

LIMIT_S = 5.0
"""Processor time of one comparison, seconds."""
MEMORY_BYTES = 4 << 30
"""Address space of a worker; a formula that needs more ends with an error instead of filling the machine."""
WALL_TIME_FACTOR = 60
"""A worker that does not answer for this many times its limit is ended from outside: it is stopped, not computing."""
MAX_WORKERS = 2


class JudgeFailed(Exception):
    """Two formulas could not be compared, which says nothing about whether they are equal."""


class FormulaPool:
    """Worker processes that compare formulas; usable from any thread."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._idle: list[subprocess.Popen[bytes]] = []
        self._slots = threading.Semaphore(MAX_WORKERS)

    def equal(self, first: str, second: str) -> bool:
        """Whether two formulas are mathematically equal; the order makes no difference.

        Raises:
            JudgeFailed: the comparison needs more processor time or memory than it may use.
        """
        with self._slots:
            reply = self._ask(first, second) or self._ask(first, second)
        if reply is None:
            raise JudgeFailed("the process that compares formulas was ended from outside, twice")
        if isinstance(reply["result"], bool):
            return reply["result"]
        raise JudgeFailed(f"{reply['result']}: {first[:80]!r} against {second[:80]!r}")

    def close(self) -> None:
        """End the idle workers."""
        while self._idle:
            _end(self._idle.pop())

    def _ask(self, first: str, second: str) -> dict[str, bool | str] | None:
        """A worker's reply; None where something other than the limit ended the worker."""
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _start(self._limit_s)
        assert worker.stdin is not None
        assert worker.stdout is not None
        line = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(json.dumps([first, second]).encode() + b"\n")
                worker.stdin.flush()
            if select.select([worker.stdout], [], [], WALL_TIME_FACTOR * self._limit_s)[0]:
                line = worker.stdout.readline()
        finally:
            if line:
                self._idle.append(worker)
            else:
                _end(worker)
        if line:
            reply: dict[str, bool | str] = json.loads(line)
            return reply
        if worker.returncode == -signal.SIGPROF:
            return {"result": f"comparing takes more than {self._limit_s:g} s of processor time"}
        if worker.returncode == -signal.SIGKILL:
            return {"result": "comparing was killed, as the system does where memory is short"}
        return None


def _start(limit_s: float) -> "subprocess.Popen[bytes]":
    """A new worker, which is ready to compare."""
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "components.core.text.formulas", str(limit_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # SymPy orders terms by their hashes
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != b"ready\n":
        _end(worker)
        raise RuntimeError(f"the process that compares formulas does not start (exit status {worker.returncode})")
    return worker


def _end(worker: "subprocess.Popen[bytes]") -> None:
    """Kill a worker, unless it has ended."""
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()  # type: ignore[union-attr]
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(0.2)
    worker.kill()
    worker.wait()


def _serve(limit_s: float) -> None:
    """Answer each line of standard input, a JSON list of two formulas, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to handle
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _compare("x + 1", "1 + x")  # loads the grammar
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        first, second = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # SIGPROF ends a process that does not handle it
        try:
            result: bool | str = _compare(first, second)
        except MemoryError:
            result = f"comparing takes more than {MEMORY_BYTES >> 30} GiB of memory"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps({"result": result}) + "\n")
        sys.stdout.flush()


def _compare(first: str, second: str) -> bool:
    """Mathematical equality, in either order: math-verify treats its reference and its target differently."""
    from math_verify import parse, verify  # slow to import, and only workers need it

    try:
        left, right = (parse(f"${text}$", parsing_timeout=None, raise_on_error=True) for text in (first, second))
        pairs = ((left, right), (right, left))
        return any(verify(*pair, timeout_seconds=None, raise_on_error=True) for pair in pairs)
    except MemoryError:
        raise
    except Exception:  # whatever SymPy cannot read or compare is not equal
        return False


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # math-verify warns about every comparison without a time limit of its own
    _serve(float(sys.argv[1]))
