"""Worker processes for foreign code without a time limit of its own, which a limit of processor time ends.

The kernel ends a process that uses more processor time than one request may take, even inside native code and even
after its owner has ended; the next request starts a new one. The limit counts processor time, so that a busy machine
does not change what is right. Requests and replies are lines of JSON on the standard input and output of a worker.
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
from collections.abc import Callable
from typing import Any

LIMIT_S = 5.0
"""Processor time of one request, seconds."""
MEMORY_BYTES = 4 << 30
"""Address space of a worker; a request that needs more ends with an error instead of filling the machine."""
WALL_TIME_FACTOR = 60
"""A worker that does not answer for this many times its limit is ended from outside: it is stopped, not computing."""
MAX_WORKERS = 2
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Of a worker. SymPy orders terms by their hashes, and a library may draw from a set; one thread is all that a worker
uses, and each that OpenBLAS starts takes address space."""


class JudgeFailed(Exception):
    """An answer could not be judged, which says nothing about whether it is right."""


class WorkerPool:
    """Worker processes of one program, each of which answers one request at a time; usable from any thread."""

    def __init__(self, program: str, activity: str, limit_s: float = LIMIT_S) -> None:
        """Start nothing yet.

        Args:
            program: module whose main part calls `serve`.
            activity: what a request makes a worker do, such as "comparing"; for messages.
            limit_s: processor time of one request, seconds.
        """
        self._program, self._activity, self._limit_s = program, activity, limit_s
        self._idle: list[subprocess.Popen[bytes]] = []
        self._slots = threading.Semaphore(MAX_WORKERS)

    def ask(self, request: object, about: str) -> Any:
        """A worker's answer to a request.

        Args:
            request: a JSON value.
            about: what the request is about, for the message of an error.

        Raises:
            JudgeFailed: it needs more processor time or memory than it may use, or the program says that it failed.
        """
        with self._slots:
            reply = self._ask(request) or self._ask(request)
        if reply is None:
            raise JudgeFailed(f"{self._activity}: the process was ended from outside, twice: {about}")
        if "failure" in reply:
            raise JudgeFailed(f"{reply['failure']}: {about}")
        return reply["result"]

    def close(self) -> None:
        """End the idle workers."""
        while self._idle:
            _end(self._idle.pop())

    def _ask(self, request: object) -> dict[str, Any] | None:
        """A worker's reply; None where something other than the limit ended the worker."""
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = self._start()
        assert worker.stdin is not None
        assert worker.stdout is not None
        line = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(json.dumps(request).encode() + b"\n")
                worker.stdin.flush()
            if select.select([worker.stdout], [], [], WALL_TIME_FACTOR * self._limit_s)[0]:
                line = worker.stdout.readline()
        finally:
            if line:
                self._idle.append(worker)
            else:
                _end(worker)
        if line:
            reply: dict[str, Any] = json.loads(line)
            if reply.get("failure") == MEMORY_ERROR:
                return {"failure": f"{self._activity} takes more than {MEMORY_BYTES >> 30} GiB of memory"}
            return reply
        if worker.returncode == -signal.SIGPROF:
            return {"failure": f"{self._activity} takes more than {self._limit_s:g} s of processor time"}
        if worker.returncode == -signal.SIGKILL:
            return {"failure": f"{self._activity} was killed, as the system does where memory is short"}
        return None

    def _start(self) -> "subprocess.Popen[bytes]":
        """A new worker, which is ready for requests."""
        worker = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", self._program, str(self._limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT},
        )
        assert worker.stdout is not None
        if worker.stdout.readline() != b"ready\n":
            _end(worker)
            raise RuntimeError(
                f"{self._activity}: the process {self._program} does not start (exit status {worker.returncode})"
            )
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


class RequestFailed(Exception):
    """What a program raises where a request has no result; the message becomes that of `JudgeFailed`."""


MEMORY_ERROR = "MemoryError"


def serve(limit_s: float, answer: Callable[[Any], object], prepare: Callable[[], object]) -> None:
    """Answer each line of standard input until it ends; the main part of a worker's program.

    Args:
        limit_s: processor time of one request, seconds.
        answer: from request to result, both JSON values.
        prepare: imports what is slow to import, before the first request.
    """
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to handle
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what foreign code prints is no reply
    prepare()
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # SIGPROF ends a process that does not handle it
        try:
            reply = {"result": answer(request)}
        except MemoryError:
            reply = {"failure": MEMORY_ERROR}
        except RequestFailed as error:
            reply = {"failure": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
