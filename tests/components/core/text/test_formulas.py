"""Formulas are compared in processes that a time limit ends."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from components.core.text.formulas import FormulaPool
from components.core.text.judges.worker_pool import JudgeFailed

ENDLESS = r"\binom{1000000}{500000}"


@pytest.fixture
def pool() -> Iterator[FormulaPool]:
    pool = FormulaPool(limit_s=0.5)
    yield pool
    pool.close()


def workers() -> list[psutil.Process]:
    def is_worker(child: psutil.Process) -> bool:
        try:
            return "components.core.text.formulas" in child.cmdline()
        except psutil.NoSuchProcess:  # a child that another test left may end meanwhile, or wait to be reaped
            return False

    return [child for child in psutil.Process().children() if is_worker(child)]


def test_what_takes_too_long_is_no_verdict_and_the_next_comparison_goes_on(pool):
    with pytest.raises(JudgeFailed, match=r"more than 0\.5 s of processor time: .*binom"):
        pool.equal(ENDLESS, "x+1")

    assert pool.equal("x+1", "1+x")
    assert not pool.equal("x+1", "x+2")


def test_a_worker_that_was_ended_is_replaced(pool):
    before = {worker.pid for worker in workers()}
    assert pool.equal("x+1", "1+x")
    (worker,) = (worker for worker in workers() if worker.pid not in before)
    os.kill(worker.pid, signal.SIGTERM)
    worker.wait()

    assert pool.equal("x+1", "1+x")


def test_threads_share_a_few_workers(pool):
    before = {worker.pid for worker in workers()}
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda n: pool.equal(f"x+{n}", f"{n % 3}+x"), range(12)))

    assert verdicts == [number < 3 for number in range(12)]
    assert len({worker.pid for worker in workers()} - before) <= 2


def test_a_closed_pool_leaves_no_process(pool):
    before = {worker.pid for worker in workers()}
    pool.equal("x+1", "1+x")
    pool.close()

    assert {worker.pid for worker in workers()} <= before
