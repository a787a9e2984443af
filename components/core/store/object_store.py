"""The interface of an object store: objects by path. `folder_store.py` and `bucket_store.py` implement it by obstore.

Each operation is complete or without effect. obstore writes atomically and conditionally, uploads large files in
parts, and retries failed requests briefly. The two classes add digests, durability after a power failure, checks of
what lies in a folder, retries over longer outages, and errors with a way out.
"""

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from components.core.base.errors import CorruptArtifact
from components.core.store.manifest import FileEntry, SourceFile

MAX_DOCUMENT_BYTES = 64 << 20
"""Largest object that is read into memory at once: a manifest, record or report. Weights and data are streamed."""
PART_BYTES = 8 << 20
"""A larger file is uploaded in parts of this size."""


class ObjectInfo(NamedTuple):
    """Metadata of an object, read without its contents."""

    path: str
    size: int
    modified: float
    """Unix time, s."""
    stamp: Hashable
    """Equal stamps of one path mean equal bytes."""


class ObjectStore(Protocol):
    """Objects by path. Paths are relative and POSIX."""

    folder: Path | None
    """The root folder, where objects are plain files of this machine."""

    def put_file(self, path: str, source: SourceFile) -> None:
        """Store a file, complete or not at all. An object with the same contents is not written again."""

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Store small data. With `if_absent` an existing object is left unchanged, and the result is False."""

    def get(self, path: str) -> bytes | None:
        """Small data, None without an object. CorruptArtifact where it is not a regular file, or is too large."""

    def get_file(self, path: str, target: Path) -> FileEntry | None:
        """Copy an object to a new file; returns what was read, None for a link. FileNotFoundError without an object."""

    def entry(self, path: str) -> FileEntry:
        """Digest and size of an object, from all its bytes. FileNotFoundError without an object."""

    def stat(self, path: str) -> ObjectInfo | None:
        """Metadata of an object, None without an object."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects below a prefix that ends with a slash, sorted by path."""

    def delete(self, path: str) -> None:
        """Remove an object; no effect without one."""

    def discard_partial(self, age_s: float) -> None:
        """Remove partly written objects of writers that were killed at least `age_s` ago, or have the server do so."""


def check_document_size(path: str, size: int) -> None:
    """Raise CorruptArtifact where an object is larger than any document of Tessera."""
    if size > MAX_DOCUMENT_BYTES:
        raise CorruptArtifact(
            f"{path} is larger than {MAX_DOCUMENT_BYTES:,} bytes", hint="Tessera did not write it; remove it"
        )
