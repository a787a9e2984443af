import threading
from queue import Queue

import pytest

from components.core.base.background import repeated
from components.core.base.errors import StoreError
from tests.waiting import PATIENCE_S


def test_calls_go_on_after_one_that_failed_and_end_with_the_block() -> None:
    calls: list[int] = []
    threads: set[threading.Thread] = set()
    third = threading.Event()

    def act() -> None:
        threads.add(threading.current_thread())
        calls.append(len(calls))
        if len(calls) == 1:
            raise StoreError("the store does not answer")
        if len(calls) == 3:
            third.set()

    with repeated(act, 0.001):
        assert third.wait(PATIENCE_S)
    (thread,) = threads
    assert not thread.is_alive()
    assert calls == list(range(len(calls)))


def test_an_error_in_the_block_reaches_the_caller_and_ends_the_calls() -> None:
    threads: Queue[threading.Thread] = Queue()

    def fail() -> None:
        with repeated(lambda: threads.put(threading.current_thread()), 0.001):
            threads.put(threads.get(timeout=PATIENCE_S))
            raise ValueError("of the block")

    with pytest.raises(ValueError, match="of the block"):
        fail()
    assert not threads.get().is_alive()
