"""A file on its way into a store, read in such a way that a change after it was hashed is noticed."""

import hashlib
import os
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

from components.core.base.errors import StoreError
from components.core.base.fault_injection import fault_point
from components.core.store.manifest import FileEntry, hash_file

SETTLED_S = 2.0
"""Age from which a change to a file alters its time of modification on any file system, s."""


@dataclass(frozen=True)
class SourceFile:
    """A file that was hashed.

    Attributes:
        path: where the file is.
        entry: digest and size when it was hashed.
        stamp: `stamp_of` the file then; None where a change would not alter it, so that sending hashes it again.
    """

    path: Path
    entry: FileEntry
    stamp: Hashable | None = None

    def chunks(self, chunk_bytes: int) -> Iterator[bytes]:
        """The contents in pieces; the last one only if the file did not change since it was hashed.

        Raises:
            StoreError: the file changed.
        """
        sha, done = hashlib.sha256(), 0
        with self.path.open("rb", buffering=0) as file:
            while chunk := file.read(chunk_bytes):
                fault_point("object.part")
                done += len(chunk)
                if self.stamp is None:
                    sha.update(chunk)
                if done >= self.entry.size and not self._is_unchanged(file.fileno(), done, sha.hexdigest()):
                    break
                yield chunk
            else:
                if done == self.entry.size:
                    return
        raise StoreError(
            f"{self.path} changed while it was being stored", hint="store it when nothing writes to it any more"
        )

    def _is_unchanged(self, handle: int, size: int, sha256: str) -> bool:
        if self.stamp is None:
            return FileEntry(sha256=sha256, size=size) == self.entry
        return stamp_of(os.fstat(handle)) == self.stamp


def read_source(path: Path) -> SourceFile:
    """Hash a file. Its stamp is taken before, so that a change during the hashing is noticed too."""
    stamp = settled_stamp(path)
    return SourceFile(path, hash_file(path), stamp)


def stamp_of(status: os.stat_result) -> Hashable:
    """A value that stays the same while a file has the same bytes; links to one file share it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def settled_stamp(path: Path) -> Hashable | None:
    """The stamp of a file, None while the file is too new for it.

    A change within one tick of a file system's clock, seconds on some, does not alter the time of modification.
    """
    status = path.stat()
    return stamp_of(status) if time.time() - status.st_mtime > SETTLED_S else None
