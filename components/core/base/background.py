"""Work that a thread does again and again beside the main one."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from components.core.base.errors import StoreError


@contextlib.contextmanager
def repeated(act: Callable[[], object], interval_s: float) -> Iterator[None]:
    """Call a function in a thread during the block, each time after an interval; no call outlasts the block.

    Args:
        act: a function whose next call makes up for one that failed with a `StoreError`.
        interval_s: time before each call, s.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(interval_s):
            with contextlib.suppress(StoreError):
                act()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
