"""A file on its way into a store: what it was when it was hashed, by which a change before it is stored is noticed."""

import hashlib
import os
import time
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from components.core.base.errors import StoreError
from components.core.store.manifest import HASH_CHUNK_BYTES, FileEntry, hash_file

SETTLED_S = 2.0
"""Age from which a file that changes gets another time of modification, whatever the file system."""


@dataclass(frozen=True)
class Source:
    """A file that was hashed.

    Attributes:
        path: where it is.
        entry: digest and size.
        stamp: `stamp_of` it; None where a change would not alter that.
        parts: digests of the stretches that it will be sent in, where there are several and they are known already.
    """

    path: Path
    entry: FileEntry
    stamp: Hashable | None = None
    parts: tuple[str, ...] = ()


def read_source(path: Path, part_bytes: int | None) -> Source:
    """Read a file once.

    Args:
        path: where it is.
        part_bytes: length of the stretches that it will be sent in, whole MiB; None for a single one.
    """
    stamp = settled_stamp(path)
    if part_bytes is None:
        return Source(path, hash_file(path), stamp)
    entry, parts = _hash_parts(path, part_bytes)
    return Source(path, entry, stamp, parts)


def _hash_parts(path: Path, part_bytes: int) -> tuple[FileEntry, tuple[str, ...]]:
    """The file as a whole, and its parts, hashed side by side from the same reading."""
    whole, size, parts = hashlib.sha256(), 0, []
    with path.open("rb") as stream, ThreadPoolExecutor(1) as beside:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            if size % part_bytes == 0:
                parts.append(hashlib.sha256())
            other = beside.submit(parts[-1].update, chunk)
            whole.update(chunk)
            other.result()
            size += len(chunk)
    return FileEntry(sha256=whole.hexdigest(), size=size), tuple(part.hexdigest() for part in parts)


def stamp_of(status: os.stat_result) -> Hashable:
    """What stays the same while a file keeps its bytes; links to one file share it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def settled_stamp(path: Path) -> Hashable | None:
    """The stamp of a file, by which a later change will be noticed; None while it is too new for that.

    A change within the same tick of a file system's clock, seconds on some, leaves the time as it was.
    """
    status = path.stat()
    return stamp_of(status) if time.time() - status.st_mtime > SETTLED_S else None


def changed_meanwhile(source: Path) -> StoreError:
    """The error for a file that was written to while it was being stored."""
    return StoreError(f"{source} changed while it was being stored", hint="store it once nothing writes to it any more")
