"""Objects of a bucket, through obstore. Requests are repeated while the server is away, and downloads continue."""

import contextlib
import functools
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from obstore.exceptions import AlreadyExistsError, BaseError

from components.core.base.errors import StoreError
from components.core.base.fault_injection import fault_point
from components.core.store.bucket import Bucket
from components.core.store.bucket_errors import (
    ServerError,
    check_access,
    interrupted_download,
    refused_request,
    server_away,
)
from components.core.store.manifest import FileEntry, SourceFile, hash_chunks
from components.core.store.object_store import PART_BYTES, ObjectInfo, check_document_size

PARALLEL_PARTS = 4
MAX_PARTS = 9_000
"""Parts of one upload. S3 allows 10,000, so a very large file gets larger parts."""
CHUNK_BYTES = 1 << 20
QUIET_S = 2.0
"""obstore's own retries cover an outage up to this length, without a message to the user."""
PATIENCE_S = 30.0
"""Time from the first failure of a request to its last attempt."""
CONNECT_S, READ_S = 5.0, 30.0
"""Limits for opening a connection, and for the next bytes of an answer."""
PAUSE_S, MAX_PAUSE_S = 0.1, 2.0
"""Pause before the second attempt; doubled before each further one."""
MAX_INTERRUPTIONS = 5
"""Consecutive interruptions of one download without a new byte."""

Answer = TypeVar("Answer")
log = logging.getLogger("tessera.store")


class BucketStore:
    """Objects of a bucket below a prefix."""

    folder: Path | None = None

    def __init__(self, uri: str) -> None:
        self.bucket = Bucket(uri)
        self._was_reached = False
        self._outage_start: float | None = None

    @functools.cached_property
    def _client(self) -> Any:
        return self._connect(QUIET_S)

    @functools.cached_property
    def _patient_client(self) -> Any:
        """Retries failed parts of an upload for longer, so that a large file is not uploaded again from its start."""
        return self._connect(PATIENCE_S)

    def _connect(self, retry_s: float) -> Any:
        backoff = {"init_backoff": timedelta(seconds=PAUSE_S), "max_backoff": timedelta(seconds=MAX_PAUSE_S)}
        return self.bucket.connect(
            retry_config={"max_retries": 1000, "retry_timeout": timedelta(seconds=retry_s), "backoff": backoff},
            client_options={
                "timeout": timedelta(days=1),
                "connect_timeout": timedelta(seconds=CONNECT_S),
                "read_timeout": timedelta(seconds=READ_S),
            },
        )

    def put_file(self, path: str, source: SourceFile) -> None:
        """Upload a file. Its digest goes into the metadata, so that a later upload of the same contents is skipped."""
        entry = source.entry
        part_bytes = max(PART_BYTES, -(-entry.size // MAX_PARTS))

        def send(client: Any) -> None:
            with contextlib.suppress(FileNotFoundError):
                found = client.get(path, options={"head": True})
                if found.meta["size"] == entry.size and found.attributes.get(_DIGEST) == entry.sha256:
                    return
            fault_point("object.put")
            chunks = source.chunks(part_bytes)
            options = {"chunk_size": part_bytes, "max_concurrency": PARALLEL_PARTS}
            body = b"".join(chunks) if entry.size <= PART_BYTES else chunks
            client.put(path, body, attributes={_DIGEST: entry.sha256}, **options)
            fault_point("object.named")

        self._request("write to", send, size=entry.size, in_parts=entry.size > PART_BYTES)

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Upload small data in one request.

        A unique writer id goes into the metadata. When a conditional request is repeated because its answer was lost,
        the id shows whether the existing object is from this writer.
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
                if not if_absent or ServerError(error).is_transient:
                    raise
                return bool(client.get(path, options={"head": True}).attributes.get(_WRITER) == writer)
            fault_point("object.named")
            return True

        return self._request("write to", send, size=len(data))

    def get(self, path: str) -> bytes | None:
        """Download small data."""
        with contextlib.suppress(FileNotFoundError):
            return b"".join(self._chunks(path, is_document=True))
        return None

    def get_file(self, path: str, target: Path) -> FileEntry | None:
        """Download to a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            return hash_chunks(self._chunks(path), file)

    def entry(self, path: str) -> FileEntry:
        """Download for the digest alone."""
        return hash_chunks(self._chunks(path))

    def _chunks(self, path: str, is_document: bool = False) -> Iterator[Any]:
        """The contents in buffers. After an interruption, the rest of the same version of the object is requested."""
        done, interruptions, options = 0, 0, None
        while True:
            fault_point("object.get")
            result = self._request("read", lambda client, options=options: client.get(path, options=options))  # type: ignore[misc]
            if is_document:
                check_document_size(path, result.meta["size"])
            try:
                for chunk in result.stream(CHUNK_BYTES):
                    yield chunk
                    done, interruptions = done + len(chunk), 0
                return
            except BaseError as error:
                interruptions += 1
                if interruptions > MAX_INTERRUPTIONS:
                    raise interrupted_download(self.bucket, ServerError(error)) from None
                time.sleep(PAUSE_S * interruptions)
            if done:
                if done >= result.meta["size"]:
                    return
                options = {"range": {"offset": done}, "if_match": result.meta["e_tag"]}

    def stat(self, path: str) -> ObjectInfo | None:
        """Request the metadata of an object."""
        with contextlib.suppress(FileNotFoundError):
            return _object_info(self._request("read", lambda client: client.head(path)))
        return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Request all pages of a listing."""
        found = self._request("list", lambda client: client.list(prefix).collect())
        return iter(sorted(map(_object_info, found)))

    def delete(self, path: str) -> None:
        """Remove an object."""
        fault_point("object.delete")
        with contextlib.suppress(FileNotFoundError):
            self._request("delete from", lambda client: client.delete(path))

    def discard_partial(self, age_s: float) -> None:
        """Set the lifecycle rule by which the server ends abandoned uploads. Their parts are invisible until then."""
        if self.bucket.scheme == "s3":
            try:
                self.bucket.expire_abandoned_uploads()
            except StoreError as error:
                log.warning("%s", error.message)

    def _request(self, doing: str, send: Callable[[Any], Answer], *, size: int = 0, in_parts: bool = False) -> Answer:
        """Make a request. While the server is away or overloaded, repeat it until `PATIENCE_S` have passed.

        Args:
            doing: for messages: `read`, `list`, `write to` or `delete from` the bucket.
            send: makes the request with a client of obstore; repeating it must be safe.
            size: bytes that are to be stored.
            in_parts: whether it is an upload in parts. Its second attempt uses the patient client.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: the server refuses, or stays away.
        """
        started, failed, pause_s = time.monotonic(), None, PAUSE_S
        while True:
            try:
                if not self._was_reached:
                    check_access(self.bucket, self._client)
                    self._was_reached = True
                answer = send(self._patient_client if in_parts and failed else self._client)
            except (BaseError, FileNotFoundError) as caught:
                if isinstance(caught, FileNotFoundError) and caught.errno is not None:  # a file of this machine
                    raise
                error = ServerError(caught)
                if error.is_absent_object:
                    raise FileNotFoundError("no such object") from None
                if not error.is_transient:
                    raise refused_request(
                        self.bucket, self._client, error, doing, size, was_reached=self._was_reached
                    ) from None
                now = time.monotonic()
                failed = failed or max(started, now - QUIET_S)
                if now - failed >= PATIENCE_S:
                    raise server_away(self.bucket, error) from None
                if now - started >= QUIET_S and self._outage_start is None:
                    self._outage_start = failed
                    log.warning("%s %s; trying for %.0f s", self.bucket.server, error.description, PATIENCE_S)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
            else:
                if (start := self._outage_start) is not None:
                    self._outage_start = None
                    log.warning("%s answers again, after %.0f s", self.bucket.server, time.monotonic() - start)
                return answer


def _object_info(found: Any) -> ObjectInfo:
    return ObjectInfo(found["path"], found["size"], found["last_modified"].timestamp(), found["e_tag"])


_WRITER, _DIGEST = "writer", "sha256"
"""Keys in the metadata of objects."""
