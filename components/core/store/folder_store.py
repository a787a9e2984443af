"""Objects as files below a folder. obstore writes them; they are read here, and only regular files are accepted."""

import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Literal

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from components.core.base.errors import CorruptArtifact, StoreError
from components.core.base.fault_injection import fault_point
from components.core.store.manifest import FileEntry, SourceFile, hash_stream, stamp_of
from components.core.store.object_store import PART_BYTES, ObjectInfo, check_document_size

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of `link` on file systems without hard links, such as exFAT and some in user space."""
_CREATING = ".creating"
"""Lock file in the root of a store on such a file system."""


class FolderStore:
    """Objects are files below a root folder."""

    def __init__(self, root: Path) -> None:
        self.folder: Path | None = root
        self._root = root

    @functools.cached_property
    def _files(self) -> LocalStore:
        return LocalStore(self._root, mkdir=True)

    def put_file(self, path: str, source: SourceFile) -> None:
        """Copy a file. An existing copy is read first, and replaced if it is damaged."""
        with contextlib.suppress(OSError, CorruptArtifact):  # absent, unreadable or not a regular file: write it again
            if self.entry(path) == source.entry:
                return
        self._put(path, source.chunks(PART_BYTES), source.entry.size, "overwrite")

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write a small file."""
        return self._put(path, [data], len(data), "create" if if_absent else "overwrite")

    def _put(self, path: str, chunks: Iterable[bytes], size: int, mode: Literal["create", "overwrite"]) -> bool:
        """Write a file atomically, then flush it, which obstore does not.

        Records are written after the files that they name. So after a power failure a file may have its name and
        damaged contents, but no record names contents that were not flushed. The digest detects the damage, and the
        file is written again.
        """
        target = self._root / path
        with explain_write_errors(size, self._root):
            fault_point("object.put")
            if mode == "overwrite" and target.is_dir():
                remove(target)
            body = b"".join(chunks) if mode == "create" or size <= PART_BYTES else iter(chunks)
            try:
                self._files.put(path, body, mode=mode)
            except AlreadyExistsError:
                return False
            except BaseError as error:
                if mode == "overwrite" or _system_error(error).errno not in _NO_HARD_LINKS:
                    raise _system_error(error) from None
                if not self._create_locked(path, body):
                    return False
            fault_point("object.named")
            try:
                _flush(target)
            except OSError:
                remove(target)
                raise
            fault_point("object.flushed")
        if path.startswith("blobs/"):
            target.chmod(0o444)
        return True

    def _create_locked(self, path: str, data: bytes | Iterator[bytes]) -> bool:
        """Write a file if it is absent, where the file system has no hard links, by which obstore creates a file.

        All writers of such a store take the lock of one file, which the kernel releases when a process ends.
        """
        with (self._root / _CREATING).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.lexists(self._root / path):
                return False
            try:
                self._files.put(path, data)
            except BaseError as error:
                raise _system_error(error) from None
        return True

    def get(self, path: str) -> bytes | None:
        """Read a small file."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), open_regular_file(self._root / path) as file:
            check_document_size(path, os.fstat(file.fileno()).st_size)
            return file.read()
        return None

    def get_file(self, path: str, target: Path) -> FileEntry | None:
        """Link a file where both paths are on one file system, else copy it."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_regular_file(self._root / path) as file:
            try:
                os.link(self._root / path, target)
            except OSError:
                with target.open("wb") as sink:
                    return hash_stream(file, sink)
        return None

    def entry(self, path: str) -> FileEntry:
        """Read a file to its end."""
        with open_regular_file(self._root / path) as file:
            return hash_stream(file)

    def stat(self, path: str) -> ObjectInfo | None:
        """Metadata of a file, or of anything else at this path."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = (self._root / path).lstat()
            return ObjectInfo(path, status.st_size, status.st_mtime, stamp_of(status))
        return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Everything below a folder except folders and partly written files: regular files, links and pipes.

        obstore omits pipes and links without a target, which a store must report as damage.
        """
        paths = (
            Path(folder, name).relative_to(self._root).as_posix()
            for folder, folders, files in os.walk(self._root / prefix)
            for name in (*files, *(each for each in folders if os.path.islink(os.path.join(folder, each))))
            if not _PARTIAL.search(name)
        )
        return iter([found for path in sorted(paths) if (found := self.stat(path)) is not None])

    def delete(self, path: str) -> None:
        """Remove a file, or anything else at this path."""
        fault_point("object.delete")
        remove(self._root / path)

    def discard_partial(self, age_s: float) -> None:
        """Remove old temporary files of obstore."""
        for path in [each for each in self._root.rglob("*") if _PARTIAL.search(each.name)]:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.lstat().st_mtime > age_s:
                    path.unlink()


@contextlib.contextmanager
def explain_write_errors(size: int, folder: Path) -> Iterator[None]:
    """Turn a failure to write `size` bytes below `folder` into an error with the cause and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            while not folder.exists():
                folder = folder.parent
            raise StoreError(
                f"no space left at {folder}: {size:,} bytes are needed, {shutil.disk_usage(folder).free:,} are free",
                hint="free some, run `tessera store gc`, or choose another --store",
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise StoreError(
                f"cannot write to {folder}: {error.strerror}", hint="check its permissions, or choose another --store"
            ) from None
        raise


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents; no effect where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_regular_file(path: Path) -> IO[bytes]:
    """Open a file of the store. Tessera writes no links, pipes or devices, so these are refused.

    Raises:
        FileNotFoundError: nothing is at this path.
        CorruptArtifact: something else is at this path, or the file cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise CorruptArtifact(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CorruptArtifact(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")


def _system_error(error: BaseException) -> OSError:
    """The error of the operating system that an error of obstore wraps."""
    text = str(error).partition("\n\nDebug source:")[0]
    code = re.search(r"\(os error (\d+)\)", text)
    number = int(code.group(1)) if code else errno.EIO
    return OSError(number, os.strerror(number) if code else text)


def _flush(path: Path) -> None:
    """Write the contents of a file through to the disk."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size:
            os.fsync(file.fileno())


_PARTIAL = re.compile(r"#\d+$|^\.partial-")
"""Names of partly written files: obstore's, and those of earlier versions of Tessera."""
