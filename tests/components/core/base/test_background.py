import threading

import pytest

from components.core.base.background import repeated
from components.core.base.errors import StoreError
from tests.waiting import PATIENCE_S


def test_calls_go_on_after_one_that_failed_and_end_with_the_block() -> None:
    calls: list[int] = []
    third = threading.Event()

    def act() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise StoreError("the store does not answer")
        if len(calls) == 3:
            third.set()

    before = set(threading.enumerate())
    with repeated(act, 0.001):
        assert third.wait(PATIENCE_S)
    assert set(threading.enumerate()) <= before
    assert calls == list(range(len(calls)))


def test_an_error_in_the_block_reaches_the_caller_and_ends_the_calls() -> None:
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="of the block"), repeated(lambda: None, 0.001):
        raise ValueError("of the block")
    assert set(threading.enumerate()) <= before
