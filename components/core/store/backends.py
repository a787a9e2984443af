"""Where bytes live: a folder, or a bucket behind S3's API (`s3.py`). Each operation is complete or without effect."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from components.core.base.errors import CorruptArtifact, StoreError
from components.core.base.fault_injection import fault_point
from components.core.store.manifest import HASH_CHUNK_BYTES, FileEntry
from components.core.store.source_file import Source, changed_meanwhile, stamp_of

TOUCH_S = 900.0
"""Age from which an object that is written again counts as new, so that no clean-up takes it from under its writer."""
MAX_DOCUMENT_BYTES = 64 << 20
"""What is read into memory at once: manifests, records, reports; weights and data are streamed."""


class Stored(NamedTuple):
    """What a backend knows of an object without reading it."""

    path: str
    size: int
    modified: float
    """Unix time, s."""
    stamp: Hashable
    """Equal stamps of one path mean equal bytes."""

    @property
    def age(self) -> float:
        """Seconds since the object was written."""
        return time.time() - self.modified


class Backend(Protocol):
    """Objects by path. Paths are relative and POSIX."""

    folder: Path | None
    """The root, where objects are plain files of this machine."""

    def part_bytes(self, size: int) -> int | None:
        """Length of the parts that a file of `size` bytes is sent in; None for a single one."""

    def put_file(self, path: str, source: Source) -> None:
        """Store a file's contents, once they are known to be what was hashed; what is there is not sent again."""

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Store small data; with `if_absent` only where nothing is, False where something was."""

    def get(self, path: str) -> bytes | None:
        """Small data, None where nothing is. CorruptArtifact where it is no plain file, or larger than small."""

    def get_file(self, path: str, target: Path, size: int) -> FileEntry | None:
        """Bring an object to a new file; returns what was read, None for a link. FileNotFoundError where none is.

        `size` is what is expected, bytes, to plan the transfer with; what comes may differ.
        """

    def entry(self, path: str) -> FileEntry:
        """Read an object through. Raises FileNotFoundError where nothing is."""

    def stat(self, path: str) -> Stored | None:
        """What is known of an object, None where nothing is."""

    def list(self, prefix: str) -> Iterator[Stored]:
        """Objects below a prefix that ends with a slash, sorted by path."""

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens where nothing is."""

    def discard_partial(self, age_s: float) -> None:
        """Remove what writers that were killed at least `age_s` ago left half-written."""


class FolderBackend:
    """Objects are files below a root; blobs are read-only and may be linked from elsewhere."""

    def __init__(self, root: Path) -> None:
        self.folder: Path | None = root
        self._root = root

    def part_bytes(self, size: int) -> int | None:
        """Files are copied in one piece."""
        return None

    def put_file(self, path: str, source: Source) -> None:
        """Copy, hashing it again, flush to the disk, then rename; a damaged file is replaced."""
        found, entry = self.stat(path), source.entry
        with contextlib.suppress(OSError, CorruptArtifact):  # unreadable, a link, or gone in the meantime: written anew
            if found is not None and found.size == entry.size and self.entry(path) == entry:
                if found.age > TOUCH_S:
                    os.utime(self._at(path))
                return
        with self._whole(path, entry.size) as partial, source.path.open("rb") as stream, partial.open("wb") as sink:
            if hash_chunks(iter(lambda: stream.read(HASH_CHUNK_BYTES), b""), sink) != entry:
                raise changed_meanwhile(source.path)

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write beside, flush, then rename, or link where only one may win."""
        if not if_absent:
            with self._whole(path, len(data)) as partial:
                partial.write_bytes(data)
            return True
        if os.path.lexists(self._at(path)):
            return False
        with self._partial(path, len(data)) as partial:
            partial.write_bytes(data)
            fault_point("folder.written")
            _flush(partial, path)
            fault_point("folder.flushed")
            try:
                os.link(partial, self._at(path))
            except FileExistsError:
                return False
            fault_point("folder.named")
        return True

    def get(self, path: str) -> bytes | None:
        """Read a file."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), _readable(self._at(path)) as stream:
            return join_chunks(path, iter(lambda: stream.read(HASH_CHUNK_BYTES), b""))
        return None

    def get_file(self, path: str, target: Path, size: int) -> FileEntry | None:
        """Link where both are on one file system, else copy."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _readable(self._at(path)) as stream:
            try:
                os.link(self._at(path), target)
            except OSError:
                with target.open("wb") as sink:
                    return hash_chunks(iter(lambda: stream.read(HASH_CHUNK_BYTES), b""), sink)
        return None

    def entry(self, path: str) -> FileEntry:
        """Read a file through."""
        with _readable(self._at(path)) as stream:
            return hash_chunks(iter(lambda: stream.read(HASH_CHUNK_BYTES), b""))

    def stat(self, path: str) -> Stored | None:
        """What the file system knows of a file."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = self._at(path).lstat()
            return Stored(path, status.st_size, status.st_mtime, stamp_of(status))
        return None

    def list(self, prefix: str) -> Iterator[Stored]:
        """Files and links below a folder; half-written ones do not count."""
        names = (
            os.path.join(folder, name)
            for folder, folders, files in os.walk(self._at(prefix))
            for name in (*files, *(each for each in folders if os.path.islink(os.path.join(folder, each))))
            if not name.startswith(_PARTIAL)
        )
        for path in sorted(Path(name).relative_to(self._root).as_posix() for name in names):
            if (found := self.stat(path)) is not None:
                yield found

    def delete(self, path: str) -> None:
        """Unlink a file, or whatever a stranger put in its place."""
        fault_point("folder.delete")
        remove(self._at(path))

    def discard_partial(self, age_s: float) -> None:
        """Unlink temporary files."""
        for path in list(self._root.rglob(f"{_PARTIAL}*")):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > age_s:
                    path.unlink()

    def _at(self, path: str) -> Path:
        return self._root / path

    @contextlib.contextmanager
    def _partial(self, path: str, size: int) -> Iterator[Path]:
        """A file of another name beside the target, removed afterwards."""
        target = self._at(path)
        with room_for(size, self._root):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=target.parent)
            os.close(handle)
            try:
                fault_point("folder.created")
                yield Path(name)
            finally:
                Path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _whole(self, path: str, size: int) -> Iterator[Path]:
        """A file of another name that takes the target's place once it is written and flushed."""
        with self._partial(path, size) as partial:
            yield partial
            fault_point("folder.written")
            _flush(partial, path)
            fault_point("folder.flushed")
            if self._at(path).is_dir():
                remove(self._at(path))
            partial.rename(self._at(path))
            fault_point("folder.named")


def hash_chunks(chunks: Iterable[bytes], sink: IO[bytes] | None = None) -> FileEntry:
    """Digest and size of what streams by, on its way into `sink`."""
    sha, size = hashlib.sha256(), 0
    for chunk in chunks:
        sha.update(chunk)
        size += len(chunk)
        if sink is not None:
            sink.write(chunk)
    return FileEntry(sha256=sha.hexdigest(), size=size)


def join_chunks(path: str, chunks: Iterable[bytes]) -> bytes:
    """What streams by, as one piece. Raises CorruptArtifact where it is larger than any document of ours."""
    joined = bytearray()
    for chunk in chunks:
        joined += chunk
        if len(joined) > MAX_DOCUMENT_BYTES:
            raise CorruptArtifact(f"{path} is larger than {MAX_DOCUMENT_BYTES:,} bytes", hint="it is none of ours")
    return bytes(joined)


@contextlib.contextmanager
def room_for(size: int, folder: Path) -> Iterator[None]:
    """Say how much room is missing, or what is not allowed, where writing `size` bytes below `folder` fails."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            while not folder.exists():
                folder = folder.parent
            raise StoreError(
                f"no space left at {folder}: {size:,} bytes are needed, {shutil.disk_usage(folder).free:,} are free",
                hint="free some, run `tessera store gc`, or name another --store",
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise StoreError(
                f"cannot write to {folder}: {error.strerror}", hint="check its permissions, or name another --store"
            ) from None
        raise


def remove(path: Path) -> None:
    """Remove what is at a path, whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _readable(path: Path) -> IO[bytes]:
    """Open a file of the store; whoever wrote it wrote a plain file, never a link, a pipe or a device.

    Raises:
        FileNotFoundError: nothing is there.
        CorruptArtifact: something else is there, or it may not be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise CorruptArtifact(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CorruptArtifact(f"{path} is no plain file")
    return os.fdopen(handle, "rb")


def _flush(partial: Path, path: str) -> None:
    """Have the contents on the disk before they get their name; blobs are never written again."""
    with partial.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size:
            os.fsync(stream.fileno())
    partial.chmod(0o444 if path.startswith("blobs/") else 0o644)


_PARTIAL = ".partial-"
"""Beginning of the name of a half-written file."""
