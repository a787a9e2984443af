"""Objects by path, in a folder or in a bucket, through obstore. Each operation is complete or without effect.

obstore writes atomically and conditionally, sends large files in parts, and repeats failed requests for a moment. This
file adds digests, what has to survive a power failure, distrust of what lies in a folder, patience with a server that
is away for longer, and errors with a way out (`bucket.py`).
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol, TypeVar

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from components.core.base.errors import CorruptArtifact, StoreError
from components.core.base.fault_injection import fault_point
from components.core.store.bucket import SCHEMES, Bucket, Problem
from components.core.store.manifest import HASH_CHUNK_BYTES, FileEntry
from components.core.store.source_file import SourceFile, stamp_of

MAX_DOCUMENT_BYTES = 64 << 20
"""Largest object that is read into memory at once: a manifest, record or report; weights and data are streamed."""
PART_BYTES = 8 << 20
"""A larger file is sent in parts of this size, `PARTS_AT_A_TIME` of them in parallel."""
PARTS_AT_A_TIME = 4
MAX_PARTS = 9_000
"""Of one upload. S3 allows 10,000, so a very large file gets larger parts."""
CHUNK_BYTES = 1 << 20
QUIET_S = 2.0
"""An outage up to this length is bridged by obstore's own retries, and the user reads nothing of it."""
PATIENCE_S = 30.0
"""Time from the first failure of a request to its last try."""
CONNECT_S, READ_S = 5.0, 30.0
"""Limits for a connection, and for the next bytes of an answer."""
PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
"""Pause before the second try; doubled before each further one."""
MAX_BREAKS = 5
"""Interruptions of one download without a new byte between them."""

Answer = TypeVar("Answer")
log = logging.getLogger("tessera.store")


class Stored(NamedTuple):
    """What is known of an object without reading it."""

    path: str
    size: int
    modified: float
    """Unix time, s."""
    stamp: Hashable
    """Equal stamps of one path mean equal bytes."""


class ObjectStore(Protocol):
    """Objects by path. Paths are relative and POSIX."""

    folder: Path | None
    """The root, where objects are plain files of this machine."""

    def put_file(self, path: str, source: SourceFile) -> None:
        """Store a file, complete or not at all; an object that has the same contents is not written again."""

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Store small data. With `if_absent` an object that exists stays, and the answer is False."""

    def get(self, path: str) -> bytes | None:
        """Small data, None where there is no object. CorruptArtifact where it is no plain file, or not small."""

    def get_file(self, path: str, target: Path) -> FileEntry | None:
        """Copy an object to a new file; returns what was read, None for a link. FileNotFoundError without an object."""

    def entry(self, path: str) -> FileEntry:
        """Digest and size of an object, read to its end. FileNotFoundError where there is none."""

    def stat(self, path: str) -> Stored | None:
        """What is known of an object, None where there is none."""

    def list(self, prefix: str) -> Iterator[Stored]:
        """Objects below a prefix that ends with a slash, sorted by path."""

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens where there is none."""

    def discard_partial(self, age_s: float) -> None:
        """See to it that half-written objects of writers that were killed at least `age_s` ago go away."""


class FolderStore:
    """Objects are files below a root. obstore writes them; they are read here, and only plain files are."""

    def __init__(self, root: Path) -> None:
        self.folder: Path | None = root
        self._root = root

    @functools.cached_property
    def _files(self) -> LocalStore:
        self._root.mkdir(parents=True, exist_ok=True)
        return LocalStore(self._root)

    def put_file(self, path: str, source: SourceFile) -> None:
        """Copy a file. The copy that exists is read first, and replaced where it is damaged."""
        with contextlib.suppress(OSError, CorruptArtifact):  # absent, unreadable or no plain file: written anew
            if self.entry(path) == source.entry:
                return
        self._put(path, source.chunks(PART_BYTES), source.entry.size, "overwrite")

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write a small file."""
        return self._put(path, [data], len(data), "create" if if_absent else "overwrite")

    def _put(self, path: str, chunks: Iterable[bytes], size: int, mode: Literal["create", "overwrite"]) -> bool:
        """Write a file atomically, then flush it, which obstore does not.

        Records are written after what they name, so after a power failure a name may have damaged contents, but no
        record names contents that were not flushed. Damaged ones are noticed by their digest and written anew.
        """
        at = self._at(path)
        with room_for(size, self._root):
            fault_point("object.put")
            if mode == "overwrite" and at.is_dir():
                remove(at)
            try:
                self._files.put(path, b"".join(chunks) if size <= PART_BYTES else iter(chunks), mode=mode)
            except AlreadyExistsError:
                return False
            except BaseError as error:
                raise _system_error(error) from None
            fault_point("object.named")
            try:
                _flush(at)
            except OSError:
                remove(at)
                raise
            fault_point("object.flushed")
        if path.startswith("blobs/"):
            at.chmod(0o444)
        return True

    def get(self, path: str) -> bytes | None:
        """Read a small file."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), _open_plain_file(self._at(path)) as file:
            refuse_large(path, os.fstat(file.fileno()).st_size)
            return file.read()
        return None

    def get_file(self, path: str, target: Path) -> FileEntry | None:
        """Link a file where both are on one file system, else copy it."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _open_plain_file(self._at(path)) as file:
            try:
                os.link(self._at(path), target)
            except OSError:
                with target.open("wb") as sink:
                    return hash_chunks(iter(lambda: file.read(HASH_CHUNK_BYTES), b""), sink)
        return None

    def entry(self, path: str) -> FileEntry:
        """Read a file to its end."""
        with _open_plain_file(self._at(path)) as file:
            return hash_chunks(iter(lambda: file.read(HASH_CHUNK_BYTES), b""))

    def stat(self, path: str) -> Stored | None:
        """What the file system knows of a file, or of whatever else is there."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = self._at(path).lstat()
            return Stored(path, status.st_size, status.st_mtime, stamp_of(status))
        return None

    def list(self, prefix: str) -> Iterator[Stored]:
        """Files, links, pipes: everything below a folder that is no folder, half-written files left out.

        obstore leaves out links to nothing and pipes; a store must report them as damage.
        """
        paths = (
            Path(folder, name).relative_to(self._root).as_posix()
            for folder, folders, files in os.walk(self._at(prefix))
            for name in (*files, *(each for each in folders if os.path.islink(os.path.join(folder, each))))
            if not _PARTIAL.search(name)
        )
        return iter([found for path in sorted(paths) if (found := self.stat(path)) is not None])

    def delete(self, path: str) -> None:
        """Remove a file, or whatever a stranger put in its place."""
        fault_point("object.delete")
        remove(self._at(path))

    def discard_partial(self, age_s: float) -> None:
        """Remove the files of obstore that have no name yet."""
        for path in [each for each in self._root.rglob("*") if _PARTIAL.search(each.name)]:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.lstat().st_mtime > age_s:
                    path.unlink()

    def _at(self, path: str) -> Path:
        return self._root / path


class BucketStore:
    """Objects of a bucket below a prefix. A server that is away is waited for."""

    folder: Path | None = None

    def __init__(self, uri: str) -> None:
        self._bucket = Bucket(uri)
        self._was_reached = False
        self._away_since: float | None = None

    @functools.cached_property
    def _client(self) -> Any:
        return self._connect(QUIET_S)

    @functools.cached_property
    def _patient_client(self) -> Any:
        """Repeats failed parts of an upload for longer, so that a large file does not begin again."""
        return self._connect(PATIENCE_S)

    def _connect(self, retry_s: float) -> Any:
        backoff = {"init_backoff": timedelta(seconds=PAUSE_S), "max_backoff": timedelta(seconds=LONGEST_PAUSE_S)}
        return self._bucket.connect(
            retry_config={"max_retries": 1000, "retry_timeout": timedelta(seconds=retry_s), "backoff": backoff},
            client_options={
                "timeout": timedelta(days=1),
                "connect_timeout": timedelta(seconds=CONNECT_S),
                "read_timeout": timedelta(seconds=READ_S),
            },
        )

    def put_file(self, path: str, source: SourceFile) -> None:
        """Upload a file with its digest among the metadata, by which a later upload finds that it is there."""
        entry = source.entry
        part_bytes = max(PART_BYTES, -(-entry.size // MAX_PARTS))

        def send(client: Any) -> None:
            with contextlib.suppress(FileNotFoundError):
                found = client.get(path, options={"head": True})
                if found.meta["size"] == entry.size and found.attributes.get(_DIGEST) == entry.sha256:
                    return
            fault_point("object.put")
            chunks = source.chunks(part_bytes)
            options = {"chunk_size": part_bytes, "max_concurrency": PARTS_AT_A_TIME}
            body = b"".join(chunks) if entry.size <= PART_BYTES else chunks
            client.put(path, body, attributes={_DIGEST: entry.sha256}, **options)
            fault_point("object.named")

        self._ask("write to", send, size=entry.size, in_parts=entry.size > PART_BYTES)

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Send small data in one request.

        The writer's name among the metadata tells whether an object that exists is this writer's own, from a request
        that was repeated because its answer was lost.
        """
        writer = uuid.uuid4().hex

        def send(client: Any) -> bool:
            fault_point("object.put")
            try:
                client.put(
                    path,
                    data,
                    mode="create" if if_absent else "overwrite",
                    attributes={_WRITER: writer},
                    use_multipart=False,
                )
            except AlreadyExistsError as error:
                if not if_absent or Problem(error).may_pass:
                    raise
                return bool(client.get(path, options={"head": True}).attributes.get(_WRITER) == writer)
            fault_point("object.named")
            return True

        return self._ask("write to", send, size=len(data))

    def get(self, path: str) -> bytes | None:
        """Download small data."""
        with contextlib.suppress(FileNotFoundError):
            return b"".join(self._chunks(path, small=True))
        return None

    def get_file(self, path: str, target: Path) -> FileEntry | None:
        """Download to a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            return hash_chunks(self._chunks(path), file)

    def entry(self, path: str) -> FileEntry:
        """Download and forget."""
        return hash_chunks(self._chunks(path))

    def _chunks(self, path: str, small: bool = False) -> Iterator[Any]:
        """An object in buffers. Where the connection breaks, the rest of the same object is asked for."""
        done, breaks, options = 0, 0, None
        while True:
            fault_point("object.get")
            result = self._ask("read", lambda client, options=options: client.get(path, options=options))  # type: ignore[misc]
            if small:
                refuse_large(path, result.meta["size"])
            try:
                for chunk in result.stream(CHUNK_BYTES):
                    yield chunk
                    done, breaks = done + len(chunk), 0
                return
            except BaseError as error:
                breaks += 1
                if breaks > MAX_BREAKS:
                    raise self._bucket.broken_off(Problem(error)) from None
                time.sleep(PAUSE_S * breaks)
            if done:
                if done >= result.meta["size"]:
                    return
                options = {"range": {"offset": done}, "if_match": result.meta["e_tag"]}

    def stat(self, path: str) -> Stored | None:
        """Ask for the head of an object."""
        with contextlib.suppress(FileNotFoundError):
            return _stored(self._ask("read", lambda client: client.head(path)))
        return None

    def list(self, prefix: str) -> Iterator[Stored]:
        """Ask for all pages of a listing."""
        found = self._ask("list", lambda client: client.list(prefix).collect())
        return iter(sorted(map(_stored, found)))

    def delete(self, path: str) -> None:
        """Remove an object."""
        fault_point("object.delete")
        with contextlib.suppress(FileNotFoundError):
            self._ask("delete from", lambda client: client.delete(path))

    def discard_partial(self, age_s: float) -> None:
        """Have the server end unfinished uploads by a rule of the bucket; until then it has their parts, unseen."""
        self._bucket.expire_unfinished_uploads()

    def _ask(self, doing: str, ask: Callable[[Any], Answer], *, size: int = 0, in_parts: bool = False) -> Answer:
        """Make a request; a server that is away or overloaded is asked again until `PATIENCE_S` have passed.

        Args:
            doing: for messages: `read`, `list`, `write to` or `delete from` the bucket.
            ask: makes the request; what it does must be repeatable.
            size: bytes that are to be stored.
            in_parts: whether an upload of many parts would begin again, so that the second try is a patient one.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: the server refuses, or stays away.
        """
        started, failed, pause_s = time.monotonic(), None, PAUSE_S
        while True:
            try:
                if not self._was_reached:
                    self._bucket.check_access(self._client)
                    self._was_reached = True
                answer = ask(self._patient_client if in_parts and failed else self._client)
            except (BaseError, FileNotFoundError) as error:
                if isinstance(error, FileNotFoundError) and error.errno is not None:  # a file of this machine
                    raise
                problem = Problem(error)
                if problem.is_absent_object:
                    raise FileNotFoundError("no such object") from None
                if not problem.may_pass:
                    raise self._bucket.refusal(
                        self._client, problem, doing, size, was_reached=self._was_reached
                    ) from None
                now = time.monotonic()
                failed = failed or max(started, now - QUIET_S)
                if now - failed >= PATIENCE_S:
                    raise self._bucket.away(problem) from None
                if now - started >= QUIET_S and self._away_since is None:
                    self._away_since = failed
                    log.warning("%s %s; trying for %.0f s", self._bucket.server, problem.trouble, PATIENCE_S)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                if (since := self._away_since) is not None:
                    self._away_since = None
                    log.warning("%s answers again, after %.0f s", self._bucket.server, time.monotonic() - since)
                return answer


def open_object_store(uri: str) -> ObjectStore:
    """The objects at an address: a folder, or `s3://bucket/prefix`, or the same with `gs` or `az`.

    Raises:
        StoreError: another scheme, or no bucket.
    """
    scheme, separator, rest = uri.partition("://")
    hint = "a store is a folder or s3://bucket/prefix, or the same with gs:// or az://"
    if separator:
        if scheme not in SCHEMES:
            raise StoreError(f"{uri} is no store", hint=hint)
        if rest[:1] in ("", "/"):
            raise StoreError(f"{uri} names no bucket", hint="write s3://bucket/prefix")
        return BucketStore(uri)
    root = Path(uri).absolute()
    if root.exists() and not root.is_dir():
        raise StoreError(f"{uri} is a file", hint=hint)
    return FolderStore(root)


def hash_chunks(chunks: Iterable[Any], sink: IO[bytes] | None = None) -> FileEntry:
    """Digest and size of a stream of buffers, which are written to `sink` on the way."""
    sha, size = hashlib.sha256(), 0
    for chunk in chunks:
        sha.update(chunk)
        size += len(chunk)
        if sink is not None:
            sink.write(chunk)
    return FileEntry(sha256=sha.hexdigest(), size=size)


def refuse_large(path: str, size: int) -> None:
    """Raise CorruptArtifact where an object is larger than any document of Tessera."""
    if size > MAX_DOCUMENT_BYTES:
        raise CorruptArtifact(
            f"{path} is larger than {MAX_DOCUMENT_BYTES:,} bytes", hint="Tessera did not write it; remove it"
        )


@contextlib.contextmanager
def room_for(size: int, folder: Path) -> Iterator[None]:
    """Turn a failure to write `size` bytes below `folder` into an error that says what is missing."""
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
    """Remove whatever is at a path."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _stored(found: Any) -> Stored:
    return Stored(found["path"], found["size"], found["last_modified"].timestamp(), found["e_tag"])


def _system_error(error: BaseException) -> OSError:
    """The error of the operating system that one of obstore wraps."""
    text = str(error).partition("\n\nDebug source:")[0]
    code = re.search(r"\(os error (\d+)\)", text)
    number = int(code.group(1)) if code else errno.EIO
    return OSError(number, os.strerror(number) if code else text)


def _open_plain_file(path: Path) -> IO[bytes]:
    """Open a file of the store; a link, a pipe or a device is not one that Tessera wrote.

    Raises:
        FileNotFoundError: there is nothing.
        CorruptArtifact: there is something else, or it cannot be read.
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


def _flush(path: Path) -> None:
    """Have the contents of a file on the disk."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size:
            os.fsync(file.fileno())


_WRITER, _DIGEST = "writer", "sha256"
"""Names among the metadata of objects in a bucket."""
_PARTIAL = re.compile(r"#\d+$|^\.partial-")
"""Names of half-written files: obstore's, and those of earlier versions of Tessera."""
