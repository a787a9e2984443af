"""Named points at which a test can end this process, or fail the call, for real.

    TESSERA_FAULT=NAME[:NTH]=ACTION   strike when a process reaches the point for the NTH time (the first by default)
    TESSERA_FAULT=count               count what is reached, for `reached`

Every step of the protocols that have to survive a crash has a point; the tests have the list of them. Without the
variable a point does nothing.
"""

import errno
import os
import signal
from collections import Counter
from threading import Lock
from typing import NamedTuple

from components.core.base.errors import InputError, StoreError

VARIABLE = "TESSERA_FAULT"


class Order(NamedTuple):
    """What is to happen, and where."""

    point: str
    nth: int
    action: str


_reached: Counter[str] = Counter()
_lock = Lock()


def fault_point(name: str) -> None:
    """Do what the environment orders for this point; nothing without an order.

    Raises:
        OSError: the order is to fail (`fail`: input/output error; `enospc`: no space), in the way of the system.
        StoreError: the same, in the way of a remote store.
        InputError: the order cannot be understood.
    """
    text = os.environ.get(VARIABLE)
    if text:
        with _lock:
            _reached[name] += 1
            count = _reached[name]
        if text != "count":
            order = parse(text)
            if (order.point, order.nth) == (name, count):
                _ACTIONS[order.action](name)


def reached() -> dict[str, int]:
    """How often this process has come to each point since there was an order."""
    return dict(_reached)


def parse(text: str) -> Order:
    """Read an order.

    Raises:
        InputError: it cannot be understood.
    """
    place, _, action = text.partition("=")
    name, _, nth = place.partition(":")
    if not name or action not in _ACTIONS or not (nth or "1").isdigit():
        raise InputError(f"{VARIABLE}={text} is no order", hint=f"write NAME[:NTH]={'|'.join(_ACTIONS)}")
    return Order(name, int(nth or "1"), action)


def _kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(name: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _fail(name: str) -> None:
    if name.startswith("object."):
        raise StoreError(f"the store cannot be used (ordered at {name})")
    raise OSError(errno.EIO, os.strerror(errno.EIO), name)


def _no_space(name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


_ACTIONS = {"kill": _kill, "term": _terminate, "fail": _fail, "enospc": _no_space}
