"""Checkpoints of one stage key on this machine; each is complete or absent."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.core.base.fault_injection import fault_point
from components.core.store.checkpoint_store import (
    checkpoint_manifest_path,
    is_valid_checkpoint,
    write_checkpoint_manifest,
)

COST_FRACTION = 0.01
"""Share of the time that checkpoints may take where no interval is given."""
MIN_INTERVAL_S = 30.0
"""Shortest time between two checkpoints where no interval is given, and the time before the first, whose cost nobody
knows yet."""

Write = Callable[[Path], None]
"""Fills the folder of a checkpoint."""


@dataclass
class Resume:
    """Checkpoints of one stage key. The newest complete one is used; older ones are removed.

    `save` fills a folder under a temporary name and renames it to `<step>`; it counts once the list of its files, with
    their digests, is written. `mirror` copies a complete checkpoint to a remote store. `notice` is called with a
    message about a damaged checkpoint. `memory` is what the writer of checkpoints keeps from one to the next, such
    as its buffers. `saved_at` is when this process last completed a checkpoint, Unix time.

    `interval_s` are the seconds between checkpoints. Where it is None, the interval follows from what the last one
    cost, so that all of them together take at most `COST_FRACTION` of the time: the cost is how long the stage stood
    still, and the processor time of what was done in the background.
    """

    folder: Path
    interval_s: float | None = None
    mirror: Write | None = None
    notice: Callable[[str], None] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    saved_at: float | None = None
    _last: float = field(default_factory=lambda: time.monotonic())
    _cost_s: float = 0.0
    _background: Future[None] | None = None

    def due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        if self.interval_s is not None:
            return time.monotonic() - self._last >= self.interval_s
        if self._background is not None and not self._background.done():
            return False
        return time.monotonic() - self._last >= max(MIN_INTERVAL_S, self._cost_s / COST_FRACTION)

    def save_in_background(self, step: int, copy: Callable[[], Write], *, completes: bool = True) -> None:
        """Save one checkpoint while the caller goes on. See `wait`.

        Args:
            step: after which the checkpoint is saved.
            copy: copies what is saved while the caller waits, and returns the function that writes the copy.
            completes: whether this process completes the checkpoint. Other ranks write their parts into its folder,
                and the returned function makes the processes wait for each other.
        """
        began = time.monotonic()
        self.wait()
        write = copy()
        self._last = time.monotonic()
        self._cost_s = self._last - began

        def work() -> None:
            began = time.thread_time()
            if completes:
                self._complete(step, write)
            else:
                write(self._partial(step))
            self._cost_s += time.thread_time() - began
            self._last = time.monotonic()

        pool = ThreadPoolExecutor(1, "resume-point")
        self._background = pool.submit(work)
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the checkpoint that is being saved is complete; raises the error of a save that failed."""
        if self._background is not None:
            saved, self._background = self._background, None
            saved.result()

    def save(self, step: int, write: Write) -> None:
        """Write one checkpoint: `write` fills a folder, which counts only once it is complete."""
        began = time.monotonic()
        self._complete(step, write)
        self._last = time.monotonic()
        self._cost_s = self._last - began

    def _complete(self, step: int, write: Write) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*"):  # from attempts that were killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        partial = self._partial(step)
        partial.mkdir()
        fault_point("point.begun")
        write(partial)
        fault_point("point.written")
        final = self.folder / f"{step:09d}"
        checkpoint_manifest_path(final).unlink(missing_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        fault_point("point.cleared")
        partial.rename(final)
        fault_point("point.placed")
        write_checkpoint_manifest(final)
        fault_point("point.named")
        if self.mirror is not None:
            self.mirror(final)
        fault_point("point.mirrored")
        for old in self.points():
            if old.name < final.name:
                checkpoint_manifest_path(old).unlink(missing_ok=True)
                shutil.rmtree(old, ignore_errors=True)
        fault_point("point.trimmed")
        self.saved_at = time.time()

    def _partial(self, step: int) -> Path:
        """The folder in which a checkpoint is written."""
        return self.folder / f".{step}.partial"

    def points(self) -> list[Path]:
        """Folders of the saved checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir()) if self.folder.is_dir() else []

    def latest(self) -> Path | None:
        """The newest checkpoint whose files match their digests, or None."""
        for point in reversed(self.points()):
            if is_valid_checkpoint(point):
                return point
            if self.notice is not None and checkpoint_manifest_path(point).exists():
                self.notice(f"resume point {point} was changed; it is not used")
        return None
