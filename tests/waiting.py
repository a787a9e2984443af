"""How tests wait for other processes: until something is true, and as long as a busy machine may need."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 600.0
"""Only a fault reaches it. Beside ten other programs on two cores, what takes 5 s alone has taken 100 s."""


def wait_until(
    what: str,
    probe: Callable[[], T],
    *,
    patience_s: float = PATIENCE_S,
    interval_s: float = 0.05,
    details: Callable[[], object] = lambda: "",
) -> T:
    """The first true value of a probe.

    Args:
        what: the thing that becomes true, for the failure.
        probe: is called again and again.
        patience_s: seconds until the test fails.
        interval_s: seconds between two calls.
        details: shown with the failure, such as the log of a server.
    """
    deadline = time.monotonic() + patience_s
    while not (found := probe()):
        assert time.monotonic() < deadline, f"not after {patience_s:g} s: {what}\n{details()}"
        time.sleep(interval_s)
    return found
