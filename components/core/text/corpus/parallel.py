"""Applies a function to all rows of a large JSON Lines file, in several processes and in order."""

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from components.core.base.processes import on_exit_of
from components.core.text.row_files import Row

CHUNK_BYTES = 1 << 20
"""Bytes of a file that are read at a time, rounded up to a whole line."""
MIN_PARALLEL_BYTES = 16 << 20
"""Smaller files are read in this process: starting others takes longer."""

T = TypeVar("T")
RowFunction = Callable[[list[Row]], T]


def map_rows(
    path: Path,
    make: Callable[[], RowFunction[T]],
    num_processes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[T]:
    """Results of a function for all rows of a file, about a megabyte of rows at a time, in the order of the file.

    Args:
        path: JSON Lines that one of our stages wrote.
        make: makes the function; called once in each process, so it must be picklable.
        num_processes: processes that share the work.
        progress: takes how many bytes of a large file are done, and how many there are.
    """
    total = path.stat().st_size
    if num_processes < 2 or total < MIN_PARALLEL_BYTES:
        function = make()
        for start, stop in _chunks(path):
            yield function(_read(path, start, stop))
            if total >= MIN_PARALLEL_BYTES:
                progress(stop, total)
        return
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _start_worker, (make, os.getpid()))
    try:
        pending: deque[tuple[int, Future[T]]] = deque()
        for start, stop in _chunks(path):
            pending.append((stop, pool.submit(_work, path, start, stop)))
            if len(pending) > 2 * num_processes:
                done, future = pending.popleft()
                yield future.result()
                progress(done, total)
        for done, future in pending:
            yield future.result()
            progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(path: Path) -> Iterator[tuple[int, int]]:
    """Where each chunk of whole lines begins and ends."""
    total, start = path.stat().st_size, 0
    with path.open("rb") as stream:
        while start < total:
            stream.seek(min(start + CHUNK_BYTES, total) - 1)
            stream.readline()
            yield start, stream.tell()
            start = stream.tell()


def _read(path: Path, start: int, stop: int) -> list[Row]:
    with path.open("rb") as stream:
        stream.seek(start)
        return [json.loads(line) for line in stream.read(stop - start).split(b"\n") if line]


_functions: list[RowFunction[Any]] = []
"""The function of this worker."""


def _start_worker(make: Callable[[], RowFunction[Any]], owner: int) -> None:
    """Prepare a worker: it has one thread, leaves Ctrl-C to its owner, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    on_exit_of(owner, lambda: os._exit(1))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _functions.append(make())


def _work(path: Path, start: int, stop: int) -> Any:
    return _functions[0](_read(path, start, stop))
