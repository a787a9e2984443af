"""Files by their SHA-256: one file, a folder of files as a manifest, and a file that is being stored."""

import hashlib
import os
import re
import time
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field, JsonValue, field_validator

from components.core.base.config import Config, digest_of
from components.core.base.errors import StoreError
from components.core.base.fault_injection import fault_point

Kind = Literal["model", "tokenizer", "data", "library", "table"]
"""model: a Hugging Face folder with its tokenizer. tokenizer: tokenizer files and chat template. data: JSONL files.
library: trained block variants, safetensors. table: JSON files with numbers."""

HASH_CHUNK_BYTES = 1 << 20
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 1024
"""Limits of file systems and S3 for a name, and for a path."""
MTIME_RESOLUTION_S = 2.0
"""A change to a file that is older than this alters its modification time on any file system, s."""
_UNSAFE = re.compile(r"[\0\\]|^[A-Za-z]:")
"""Zero bytes, backslashes and drive letters, which lead out of the folder on some system."""


class FileEntry(Config):
    """One file of an artifact."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the contents, 64 hex digits."""
    size: int = Field(ge=0)
    """Bytes."""


class Manifest(Config):
    """An artifact: its kind, its files by relative POSIX path, and metadata."""

    kind: Kind
    """Type of the files."""
    files: dict[str, FileEntry]
    """Relative POSIX path to content."""
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    """Small values, part of the digest: nothing that differs between two equal results."""

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        """Refuse paths that lead out of the artifact's folder, wherever a manifest comes from."""
        folders = {name[:end] for name in files for end, letter in enumerate(name) if letter == "/"}
        for name in files:
            if (reason := _path_fault(name)) or name in folders:
                raise ValueError(f"{name[:80]!r} {reason or 'is a file and a folder'}")
        return files

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical manifest; identifies the artifact everywhere."""
        return digest_of(self.canonical())

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())


def _path_fault(name: str) -> str | None:
    """Reason why a relative path cannot name a file of an artifact, or None."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or _UNSAFE.search(name):
        return "leaves the folder"
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "is no UTF-8"
    return "is too long" if max(sizes) > MAX_NAME_BYTES or len(name.encode()) > MAX_PATH_BYTES else None


def hash_chunks(chunks: Iterable[Any], sink: IO[bytes] | None = None) -> FileEntry:
    """Digest and size of a stream of buffers; each buffer is also written to `sink`."""
    sha, size = hashlib.sha256(), 0
    for chunk in chunks:
        sha.update(chunk)
        size += len(chunk)
        if sink is not None:
            sink.write(chunk)
    return FileEntry(sha256=sha.hexdigest(), size=size)


def hash_stream(stream: IO[bytes], sink: IO[bytes] | None = None) -> FileEntry:
    """Digest and size of an open file, read once with bounded memory; its bytes are also written to `sink`."""
    return hash_chunks(iter(lambda: stream.read(HASH_CHUNK_BYTES), b""), sink)


def hash_file(path: Path) -> FileEntry:
    """Digest and size of a file."""
    with path.open("rb") as stream:
        return hash_stream(stream)


def describe(folder: Path, kind: Kind, metadata: dict[str, JsonValue] | None = None) -> Manifest:
    """The manifest of the files below `folder`, without storing anything."""
    files = {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return Manifest(kind=kind, files=files, metadata=metadata or {})


@dataclass(frozen=True)
class SourceFile:
    """A file that was hashed and is to be stored.

    Attributes:
        path: location of the file.
        entry: digest and size when it was hashed.
        stamp: `stamp_of` the file before it was hashed; None where the file was too new for a change to alter its
            stamp, so that `chunks` hashes it again.
    """

    path: Path
    entry: FileEntry
    stamp: Hashable | None = None

    def chunks(self, chunk_bytes: int) -> Iterator[bytes]:
        """The contents in pieces. The last piece is only produced if the file did not change since it was hashed.

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
            f"{self.path} changed while it was being stored", hint="store it when no process writes to it any more"
        )

    def _is_unchanged(self, handle: int, size: int, sha256: str) -> bool:
        if self.stamp is None:
            return FileEntry(sha256=sha256, size=size) == self.entry
        return stamp_of(os.fstat(handle)) == self.stamp


def read_source(path: Path) -> SourceFile:
    """Hash a file. Its stamp is taken first, so that a change during the hashing is detected too.

    A change within the resolution of the file system's clock does not alter the modification time, so a file that was
    modified a moment ago gets no stamp.
    """
    status = path.stat()
    stamp = stamp_of(status) if time.time() - status.st_mtime > MTIME_RESOLUTION_S else None
    return SourceFile(path, hash_file(path), stamp)


def stamp_of(status: os.stat_result) -> Hashable:
    """Device, inode, size and modification time: equal while a file has the same bytes, and for links to one file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
