"""Writes layers of container images: tar files in which the same files always have the same bytes."""

import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

MODIFIED = 1767225600
"""Time of every file in a layer: the start of 2026."""
KEPT_MODE = 0o1777
"""Bits of a file's mode that reach a layer; setuid and setgid do not."""


@dataclass(frozen=True)
class Member:
    """One file, folder or symbolic link of a layer."""

    path: str
    """Relative to the root of the image."""
    content: bytes | Path | None = None
    """Bytes, or the file to read; None for a folder or a link."""
    target: str | None = None
    """Of a symbolic link."""
    mode: int = 0o644
    owner: tuple[int, int] = (0, 0)
    """Numbers of the user and of the group."""


class Layer(BaseModel):
    """A layer that was written, named by its digest."""

    model_config = ConfigDict(frozen=True)

    digest: str
    size: int


def folder_members(folder: Path, paths: Iterable[str]) -> Iterator[Member]:
    """Members for what stands at `paths` below a folder; sockets, pipes and devices are left out.

    A folder of the list stands for itself alone, not for what is in it.
    """
    for path in paths:
        source = folder / path
        found = source.lstat()
        mode, owner = found.st_mode & KEPT_MODE, (found.st_uid, found.st_gid)
        if stat.S_ISLNK(found.st_mode):
            yield Member(path, target=os.readlink(source), mode=0o777, owner=owner)
        elif stat.S_ISDIR(found.st_mode):
            yield Member(path, mode=mode, owner=owner)
        elif stat.S_ISREG(found.st_mode):
            yield Member(path, content=source, mode=mode, owner=owner)


def write_layer(members: Iterable[Member], target: Path) -> Layer:
    """Write a layer, sorted by path; folders that no member names belong to root and can be entered by all."""
    by_path = {member.path: member for member in members}
    parents = {str(parent) for path in by_path for parent in PurePosixPath(path).parents} - {"."}
    by_path = {path: Member(path, mode=0o755) for path in parents} | by_path
    with target.open("wb") as stream:
        counted = _Digest(stream)
        with tarfile.open(fileobj=counted, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for _, member in sorted(by_path.items()):
                _add(tar, member)
    return Layer(digest=f"sha256:{counted.sha256.hexdigest()}", size=target.stat().st_size)


def tar_entry(path: str, size: int = 0, mode: int = 0o644) -> tarfile.TarInfo:
    """A file of a tar archive that belongs to root and has the time of all files."""
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode, entry.mtime = size, mode, MODIFIED
    return entry


def _add(tar: tarfile.TarFile, member: Member) -> None:
    entry = tar_entry(member.path, mode=member.mode)
    entry.uid, entry.gid = member.owner
    if member.target is not None:
        entry.type, entry.linkname = tarfile.SYMTYPE, member.target
        tar.addfile(entry)
    elif member.content is None:
        entry.type = tarfile.DIRTYPE
        tar.addfile(entry)
    elif isinstance(member.content, bytes):
        entry.size = len(member.content)
        tar.addfile(entry, io.BytesIO(member.content))
    else:
        with member.content.open("rb") as stream:
            entry.size = os.fstat(stream.fileno()).st_size
            tar.addfile(entry, stream)


class _Digest(io.RawIOBase):
    """A stream that passes on what is written, and knows its digest."""

    def __init__(self, stream: BinaryIO) -> None:
        self.sha256, self._stream = hashlib.sha256(), stream

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.sha256.update(data)
        return self._stream.write(data)
