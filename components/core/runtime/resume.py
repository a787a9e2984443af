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


@dataclass
class Resume:
    """Checkpoints of one stage key. The newest complete one is used; older ones are removed.

    `save` fills a folder under a temporary name and renames it to `<step>`; it counts once the list of its files, with
    their digests, is written. `mirror` copies a complete checkpoint to a remote store. `notice` is called with a
    message about a damaged checkpoint. `memory` is what the writer of checkpoints keeps from one to the next, such
    as its buffers. `saved_at` is when this process last completed a checkpoint, Unix time.
    """

    folder: Path
    interval_s: float = 30.0
    mirror: Callable[[Path], None] | None = None
    notice: Callable[[str], None] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    saved_at: float | None = None
    _last: float = field(default_factory=time.monotonic)
    _background: Future[None] | None = None

    def due(self) -> bool:
        """Whether the last checkpoint is older than the interval."""
        return time.monotonic() - self._last >= self.interval_s

    def save_in_background(self, step: int, write: Callable[[Path], None], *, completes: bool = True) -> None:
        """Save one checkpoint while the caller goes on. See `wait`.

        Args:
            step: after which the checkpoint is saved.
            write: fills a folder; it must not read what the caller changes.
            completes: whether this process completes the checkpoint. Other ranks write their parts into its folder,
                and `write` makes the processes wait for each other.
        """
        self.wait()
        self._last = time.monotonic()
        pool = ThreadPoolExecutor(1, "resume-point")
        if completes:
            self._background = pool.submit(self.save, step, write)
        else:
            self._background = pool.submit(write, self._partial(step))
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the checkpoint that is being saved is complete; raises the error of a save that failed."""
        if self._background is not None:
            saved, self._background = self._background, None
            saved.result()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write one checkpoint: `write` fills a folder, which counts only once it is complete."""
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
        self._last, self.saved_at = time.monotonic(), time.time()

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
