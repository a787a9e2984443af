"""A bucket behind S3's API, through the MinIO client."""

import contextlib
import functools
import itertools
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from xml.etree.ElementTree import ParseError

from components.core.base.errors import StoreError
from components.core.base.fault_injection import fault_point
from components.core.store.backends import TOUCH_S, Stored, hash_chunks, join_chunks
from components.core.store.manifest import FileEntry
from components.core.store.source_file import Source

MAX_PARTS = 9_000
"""Of an upload; S3 allows 10,000, so large files get larger ones."""
STREAM_BYTES = 64 << 20
"""What is larger is sent in parts and read in ranges of this size, `STREAMS` at a time; files go side by side."""
STREAMS = 4
CHUNK_BYTES = 1 << 20
PAUSE_S = 0.2
BREAKS = 5
"""How often a download may break off, and a conditional write meet another, without getting on."""
STALLED_S = 45.0
"""How long a download may stand still, s."""
SKEW_S = 300.0
"""Difference of clocks that is named as the cause where a server refuses; S3 allows 900 s."""


class S3Backend:
    """Objects of a bucket below a prefix. `PatientHttp` repeats requests; a download that breaks off goes on."""

    folder: Path | None = None

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""

    @functools.cached_property
    def _client(self) -> Any:
        """The client, made on first use; the bucket is looked into then, so that what is wrong fails before any work.

        Raises:
            StoreError: no endpoint or credentials in the environment, or the bucket cannot be reached or used.
        """
        from components.core.store.s3_body import Client
        from components.core.store.s3_http import PatientHttp

        url = _endpoint()
        try:
            client = Client(
                url.netloc,
                credentials=_credentials(),
                secure=url.scheme == "https",
                region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
                http_client=PatientHttp(url.netloc),
            )
            inside = client.list_objects(self._bucket, prefix=self._prefix)
        except ValueError as error:  # how the client reports addresses and names that S3 does not allow
            raise StoreError(str(error), hint="check TESSERA_S3_ENDPOINT and --store") from None
        with self._explained("list"):
            next(inside, None)
        return client

    def part_bytes(self, size: int) -> int | None:
        """Large files are sent in several streams."""
        return None if size <= STREAM_BYTES else max(STREAM_BYTES, _whole_mebibytes(size / MAX_PARTS))

    def put_file(self, path: str, source: Source) -> None:
        """Upload; the object appears when all of it has arrived, with its digest among its metadata."""
        from minio.error import S3Error

        entry = source.entry
        if self._holds(path, entry):
            return
        with self._explained("write to", entry.size):
            try:
                self._upload(path, source)
            except S3Error as error:
                # Gone because the server lost it, or because it was ended by a request whose answer was lost.
                if error.code != "NoSuchUpload":
                    raise
                if not self._holds(path, entry):
                    self._upload(path, source)

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """One request, conditional where only one writer may win."""
        from minio.error import S3Error

        # The name of the writer tells whether the object that is there is our own, from a request that was repeated
        # because its answer was lost.
        headers = {"Content-Type": "application/octet-stream", _WRITER_HEADER: uuid.uuid4().hex}
        if if_absent:
            headers["If-None-Match"] = "*"
        with self._explained("write to", len(data)):
            fault_point("s3.put")
            for attempt in itertools.count():
                try:
                    # The public put_object has no way to send the condition.
                    self._client._put_object(self._bucket, self._prefix + path, data, headers)
                except S3Error as error:
                    if error.code == "ConditionalRequestConflict" and attempt < BREAKS:  # with one that is under way
                        time.sleep(PAUSE_S)
                        continue
                    if not if_absent or error.code != "PreconditionFailed":
                        raise
                    found = self._head(path)
                    return found is not None and found.metadata.get(_WRITER_HEADER) == headers[_WRITER_HEADER]
                fault_point("s3.was-put")
                return True
        raise AssertionError("unreachable")

    def get(self, path: str) -> bytes | None:
        """Download small data."""
        with contextlib.suppress(FileNotFoundError):
            return join_chunks(path, self._chunks(path))
        return None

    def get_file(self, path: str, target: Path, size: int) -> FileEntry | None:
        """Stream to a file, ranges of a large object side by side; what is in the file is hashed, in order."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w+b") as file:
            if size <= STREAM_BYTES:
                return hash_chunks(self._chunks(path), file)
            fetch = functools.partial(self._fetch_range, path, file.fileno(), threading.Lock())
            with ThreadPoolExecutor(STREAMS) as pool:
                lengths = pool.map(fetch, range(0, size, STREAM_BYTES))
                # Read back, as it is still in the page cache: chunks kept until their turn would cost more.
                return hash_chunks(_read_back(file.fileno(), lengths))

    def _fetch_range(self, path: str, handle: int, turn: threading.Lock, start: int) -> int:
        """Write one range of an object to its place in a file; returns its length, bytes.

        One thread at a time writes: several would wait for the same file inside the kernel, and spin there.
        """
        length = 0
        for chunk in self._chunks(path, start, STREAM_BYTES):
            with turn:
                length += os.pwrite(handle, chunk, start + length)
        return length

    def entry(self, path: str) -> FileEntry:
        """Stream through, keeping nothing."""
        return hash_chunks(self._chunks(path))

    def stat(self, path: str) -> Stored | None:
        """Ask for the object's head."""
        found = self._head(path)
        return None if found is None else Stored(path, found.size, found.last_modified.timestamp(), found.etag)

    def list(self, prefix: str) -> Iterator[Stored]:
        """List the keys, page by page."""
        with self._explained("list"):
            for found in self._client.list_objects(self._bucket, prefix=self._prefix + prefix, recursive=True):
                path = found.object_name.removeprefix(self._prefix)
                yield Stored(path, found.size, found.last_modified.timestamp(), found.etag)

    def delete(self, path: str) -> None:
        """Remove a key."""
        with self._explained("delete from"):
            fault_point("s3.delete")
            self._client.remove_object(self._bucket, self._prefix + path)

    def discard_partial(self, age_s: float) -> None:
        """Abort the uploads that nobody will end; until then a server keeps their parts, unseen."""
        from minio.error import S3Error

        with self._explained("delete from"):
            try:
                uploads = list(self._uploads())
            except S3Error as error:
                if error.code in ("NotImplemented", "MethodNotAllowed"):
                    return  # a server that does not tell them has rules of its own for them
                raise
            for upload in uploads:
                if time.time() - upload.initiated_time.timestamp() > age_s:
                    self._client._abort_multipart_upload(self._bucket, upload.object_name, upload.upload_id)

    def _uploads(self) -> Iterator[Any]:
        """Uploads that were begun and have not ended, page by page."""
        marks: dict[str, str] = {}
        while True:
            page = self._client._list_multipart_uploads(self._bucket, prefix=self._prefix, **marks)
            yield from page.uploads
            if not page.is_truncated:
                return
            marks = {"key_marker": page.next_key_marker, "upload_id_marker": page.next_upload_id_marker}

    def _holds(self, path: str, entry: FileEntry) -> bool:
        """Whether a file's contents are stored; they count as new from now on."""
        found = self._head(path)
        if found is None or found.size != entry.size or found.metadata.get(_DIGEST_HEADER) != entry.sha256:
            return False
        if time.time() - found.last_modified.timestamp() > TOUCH_S:
            self._touch(path, entry)
        return True

    def _upload(self, path: str, source: Source) -> None:
        """Send a file, in one request or in parts; what changed since it was hashed does not become an object."""
        from components.core.store.s3_body import Body

        with source.path.open("rb") as file:
            fault_point("s3.upload")
            body, part_bytes = Body.of(file, source), self.part_bytes(source.entry.size)
            headers = {"Content-Type": "application/octet-stream", _DIGEST_HEADER: source.entry.sha256}
            if part_bytes is None:
                self._client._put_object(self._bucket, self._prefix + path, body, headers)
            else:
                self._upload_parts(self._prefix + path, body.parts(part_bytes), headers)
            fault_point("s3.uploaded")

    def _upload_parts(self, key: str, bodies: Iterable[Any], headers: dict[str, str]) -> None:
        """Send a large file, several parts at a time; what was sent is given up where one fails."""
        from minio.datatypes import Part
        from minio.error import S3Error

        upload = self._client._create_multipart_upload(self._bucket, key, headers)

        def send(number: int, body: Any) -> Any:
            return Part(number, self._client._upload_part(self._bucket, key, body, None, upload, number))

        try:
            with ThreadPoolExecutor(STREAMS) as pool:
                parts = list(pool.map(send, itertools.count(1), bodies))
            self._client._complete_multipart_upload(self._bucket, key, upload, parts)
        except Exception:
            with contextlib.suppress(S3Error, StoreError):  # else `discard_partial` will
                self._client._abort_multipart_upload(self._bucket, key, upload)
            raise

    def _head(self, path: str) -> Any:
        from minio.error import S3Error

        with self._explained("read"):
            try:
                return self._client.stat_object(self._bucket, self._prefix + path)
            except S3Error as error:
                if error.code in _ABSENT:
                    return None
                raise

    def _touch(self, path: str, entry: FileEntry) -> None:
        """Copy an object onto itself, which gives it a new time and moves no bytes here."""
        from minio.commonconfig import REPLACE, CopySource

        with self._explained("write to"):
            self._client.copy_object(
                self._bucket,
                self._prefix + path,
                CopySource(self._bucket, self._prefix + path),
                metadata={_DIGEST: entry.sha256},
                metadata_directive=REPLACE,
            )

    def _chunks(self, path: str, start: int = 0, length: int = 0) -> Iterator[bytes]:
        """An object, or a range of it; where the connection breaks, the rest of the same object is asked for."""
        from urllib3.exceptions import HTTPError

        done, breaks, moved = 0, 0, time.monotonic()
        asked: dict[str, Any] = {"offset": start, "length": length}
        with self._explained("read"):
            while True:
                fault_point("s3.download")
                response = self._open(path, **asked)
                if response is None:
                    return
                try:
                    for chunk in response.stream(CHUNK_BYTES):
                        yield chunk
                        done, breaks, moved = done + len(chunk), 0, time.monotonic()
                    return
                except HTTPError:
                    breaks += 1
                    if breaks > BREAKS or time.monotonic() - moved >= STALLED_S:
                        raise
                    time.sleep(PAUSE_S * breaks)
                finally:
                    response.close()
                    response.release_conn()
                if length and done == length:
                    return
                if done:
                    same = {"If-Match": response.headers["ETag"]}
                    asked = {"offset": start + done, "length": max(0, length - done), "request_headers": same}

    def _open(self, path: str, **asked: Any) -> Any:
        """Begin to read an object; None where it ends before the range asked for. FileNotFoundError where none is."""
        from minio.error import S3Error

        try:
            return self._client.get_object(self._bucket, self._prefix + path, **asked)
        except S3Error as error:
            if error.code in _ABSENT:
                raise FileNotFoundError(path) from None
            if error.code == "InvalidRange":
                return None
            if error.code == "PreconditionFailed":
                raise StoreError(f"{path} was written anew while it was being read", hint="try again") from None
            raise

    @contextlib.contextmanager
    def _explained(self, doing: str, size: int = 0) -> Iterator[None]:
        """Turn the server's refusals into errors with a way out; `size` is what was to be stored, bytes."""
        from minio.error import MinioException, S3Error
        from urllib3.exceptions import HTTPError

        try:
            yield
        except S3Error as error:
            raise self._refusal(error, doing, size) from None
        except (MinioException, ParseError, ValueError) as error:  # what is no XML, or none that S3 has
            raise StoreError(
                f"what answers at {_endpoint().netloc} is no S3 server: {error}", hint="check TESSERA_S3_ENDPOINT"
            ) from None
        except HTTPError as error:
            raise StoreError(
                f"the S3 server at {_endpoint().netloc} breaks off its answers: {error}",
                hint="check the way to it; the same command goes on from here",
            ) from None

    def _refusal(self, error: Any, doing: str, size: int) -> StoreError:
        """The error for a server's refusal."""
        code, message = self._reason(error)
        skew_s = _skew_s(error)
        if code in _DENIED | {"RequestTimeTooSkewed"} and abs(skew_s) > SKEW_S:
            side = "ahead of" if skew_s > 0 else "behind"
            return StoreError(
                f"this machine's clock is {abs(skew_s):,.0f} s {side} the S3 server's",
                hint="set it; S3 refuses requests that are more than 15 minutes off",
            )
        if code in _WRONG_KEYS or (code in _DENIED and "_client" not in vars(self)):
            return StoreError(
                f"the S3 server refuses these credentials for bucket {self._bucket!r} ({code})",
                hint="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, that they have not expired, and that they may "
                "use the bucket",
            )
        if code in _DENIED:
            return StoreError(
                f"these credentials may not {doing} bucket {self._bucket!r} ({code})",
                hint="use others, or give them the right to",
            )
        if code == "NoSuchBucket":
            return StoreError(
                f"there is no bucket {self._bucket!r} at {_endpoint().netloc}", hint="create it, or check --store"
            )
        if code in _FULL:
            return StoreError(
                f"no space left in bucket {self._bucket!r}: {size:,} bytes are needed ({code})",
                hint="free some, run `tessera store gc`, or name another --store",
            )
        return StoreError(f"the S3 server answers {code}: {message}")

    def _reason(self, error: Any) -> tuple[str, str]:
        """Code and message of a refusal; asked for once more where it came, as to a HEAD, without words."""
        from minio.error import S3Error

        client = vars(self).get("_client")
        if client is not None and error.code in _DENIED and error.response is not None and not error.response.data:
            try:
                next(client.list_objects(self._bucket, prefix=self._prefix), None)
            except S3Error as told:
                error = told
        return error.code or "", error.message or ""


def _read_back(handle: int, lengths: Iterable[int]) -> Iterator[bytes]:
    """A file from its beginning, a chunk at a time, each stretch once its length is known and not a byte beyond."""
    start = end = 0
    for length in lengths:
        end += length
        while chunk := os.pread(handle, min(CHUNK_BYTES, end - start), start):
            yield chunk
            start += len(chunk)


def _skew_s(error: Any) -> float:
    """How far this machine's clock is ahead of the one of the server that answered, s; 0 where it does not tell."""
    told = None if error.response is None else error.response.headers.get("Date")
    try:
        return 0.0 if told is None else time.time() - parsedate_to_datetime(told).timestamp()
    except ValueError:
        return 0.0


def _endpoint() -> Any:
    """Address of the server, `https` where it names no scheme."""
    names = ("TESSERA_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MINIO_ENDPOINT")
    given = next((os.environ[name] for name in names if os.environ.get(name)), None)
    if given is None:
        raise StoreError(
            "an s3:// store needs the address of its server in the environment", hint=f"set {' or '.join(names)}"
        )
    return urlparse(given if "://" in given else f"https://{given}")


def _credentials() -> Any:
    """Keys from the environment, or from a mounted AWS credentials file."""
    from minio.credentials import AWSConfigProvider, ChainedProvider, EnvAWSProvider, EnvMinioProvider

    found = ChainedProvider([EnvAWSProvider(), EnvMinioProvider(), AWSConfigProvider()])
    try:
        found.retrieve()
    except ValueError:
        raise StoreError(
            "an s3:// store needs credentials in the environment",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SHARED_CREDENTIALS_FILE",
        ) from None
    return found


def _whole_mebibytes(size: float) -> int:
    """`size` rounded up to a multiple of 1 MiB."""
    return -(-int(size) // (1 << 20)) * (1 << 20)


_WRITER_HEADER = "x-amz-meta-writer"
_DIGEST = "sha256"
_DIGEST_HEADER = f"x-amz-meta-{_DIGEST}"
_ABSENT = ("NoSuchKey", "NoSuchObject", "ResourceNotFound")
_DENIED = frozenset({"AccessDenied", "Forbidden"})
_WRONG_KEYS = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
_FULL = frozenset({"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})
