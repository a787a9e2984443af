"""A bucket behind S3's API, through the MinIO client."""

import contextlib
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlparse

from components.core.artifacts import FileEntry
from components.core.backends import TOUCH_S, Stored, changed_meanwhile, hash_chunks, join_chunks
from components.core.errors import StoreError
from components.core.faults import fault_point

PART_BYTES = 8 << 20
"""Smallest part of a multipart upload; S3 allows 10,000 parts, so large files get larger ones."""
MAX_PARTS = 9_000
PARTS_AT_A_TIME = 2
"""Parts of one file under way: with this, a transfer holds at most three parts in memory."""
CHUNK_BYTES = 1 << 20
RETRIES = 4
"""Further tries after a failure that may pass."""
BACKOFF_S = 0.2
"""Pause before the second try; doubled before each further one."""

Result = TypeVar("Result")


class S3Backend:
    """Objects of a bucket below a prefix. Retries of requests are urllib3's; downloads that break off begin again."""

    folder: Path | None = None

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""

    @functools.cached_property
    def _client(self) -> Any:
        """The client, made on first use; the bucket is checked then, so that a wrong address fails before any work.

        Raises:
            StoreError: no endpoint or credentials in the environment, or the bucket cannot be reached.
        """
        from minio import Minio

        url = _endpoint()
        try:
            client = Minio(
                url.netloc,
                credentials=_credentials(),
                secure=url.scheme == "https",
                region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
                http_client=_http_client(),
            )
            with self._explained():
                found = client.bucket_exists(self._bucket)
        except ValueError as error:  # how the client reports addresses and names that S3 does not allow
            raise StoreError(str(error), hint="check TESSERA_S3_ENDPOINT and --store") from None
        if not found:
            raise StoreError(f"there is no bucket {self._bucket!r} at {url.netloc}", hint="create it, or check --store")
        return client

    def put_file(self, path: str, source: Path, entry: FileEntry) -> None:
        """Upload in parts; the object appears when all have arrived, with its digest among its metadata."""
        found = self._head(path)
        if found is not None and found.size == entry.size and found.metadata.get(_DIGEST_HEADER) == entry.sha256:
            if time.time() - found.last_modified.timestamp() > TOUCH_S:
                self._touch(path, entry)
            return
        with source.open("rb") as stream, self._explained(entry.size):
            fault_point("s3.upload")
            self._client.put_object(
                self._bucket,
                self._prefix + path,
                _Checked(stream, entry, source),
                entry.size,
                metadata={_DIGEST: entry.sha256},
                part_size=max(PART_BYTES, _whole_mebibytes(entry.size / MAX_PARTS)),
                num_parallel_uploads=PARTS_AT_A_TIME,
            )
            fault_point("s3.uploaded")

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """One request, conditional where only one writer may win."""
        from minio.error import S3Error

        # The public put_object has no way to send the condition.
        headers = {"Content-Type": "application/octet-stream", **({"If-None-Match": "*"} if if_absent else {})}
        with self._explained(len(data)):
            fault_point("s3.put")
            try:
                self._client._put_object(self._bucket, self._prefix + path, data, headers)
            except S3Error as error:
                if if_absent and error.code in ("PreconditionFailed", "ConditionalRequestConflict"):
                    return False
                raise
            fault_point("s3.was-put")
        return True

    def get(self, path: str) -> bytes | None:
        """Download small data."""
        with contextlib.suppress(FileNotFoundError):
            return self._read(path, functools.partial(join_chunks, path))
        return None

    def get_file(self, path: str, target: Path) -> FileEntry | None:
        """Stream to a file."""
        target.parent.mkdir(parents=True, exist_ok=True)

        def take(chunks: Iterable[bytes]) -> FileEntry:
            with target.open("wb") as sink:
                return hash_chunks(chunks, sink)

        return self._read(path, take)

    def entry(self, path: str) -> FileEntry:
        """Stream through, keeping nothing."""
        return self._read(path, hash_chunks)

    def stat(self, path: str) -> Stored | None:
        """Ask for the object's head."""
        found = self._head(path)
        return None if found is None else Stored(path, found.size, found.last_modified.timestamp(), found.etag)

    def list(self, prefix: str) -> Iterator[Stored]:
        """List the keys, page by page."""
        with self._explained():
            for found in self._client.list_objects(self._bucket, prefix=self._prefix + prefix, recursive=True):
                path = found.object_name.removeprefix(self._prefix)
                yield Stored(path, found.size, found.last_modified.timestamp(), found.etag)

    def delete(self, path: str) -> None:
        """Remove a key."""
        with self._explained():
            fault_point("s3.delete")
            self._client.remove_object(self._bucket, self._prefix + path)

    def discard_partial(self, age_s: float) -> None:
        """Nothing to do: an upload without its end is no object, and a bucket's lifecycle rule drops it."""

    def _head(self, path: str) -> Any:
        from minio.error import S3Error

        with self._explained():
            try:
                return self._client.stat_object(self._bucket, self._prefix + path)
            except S3Error as error:
                if error.code in _ABSENT:
                    return None
                raise

    def _touch(self, path: str, entry: FileEntry) -> None:
        """Copy an object onto itself, which gives it a new time and moves no bytes here."""
        from minio.commonconfig import REPLACE, CopySource

        with self._explained():
            self._client.copy_object(
                self._bucket,
                self._prefix + path,
                CopySource(self._bucket, self._prefix + path),
                metadata={_DIGEST: entry.sha256},
                metadata_directive=REPLACE,
            )

    def _read(self, path: str, take: Callable[[Iterable[bytes]], Result]) -> Result:
        """Hand an object's bytes to `take`, from the start again where the connection breaks."""
        from minio.error import S3Error
        from urllib3.exceptions import HTTPError

        with self._explained():
            for attempt in itertools.count():
                fault_point("s3.download")
                try:
                    response = self._client.get_object(self._bucket, self._prefix + path)
                except S3Error as error:
                    if error.code in _ABSENT:
                        raise FileNotFoundError(path) from None
                    raise
                try:
                    return take(response.stream(CHUNK_BYTES))
                except HTTPError:
                    if attempt == RETRIES:
                        raise
                    time.sleep(BACKOFF_S * 2**attempt)
                finally:
                    response.close()
                    response.release_conn()
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _explained(self, size: int = 0) -> Iterator[None]:
        """Turn the server's refusals into errors with a way out; `size` is what was to be stored, bytes."""
        from minio.error import MinioException, S3Error
        from urllib3.exceptions import HTTPError

        try:
            yield
        except S3Error as error:
            raise _refusal(error.code or "", error.message or "", self._bucket, size) from None
        except MinioException as error:
            raise StoreError(
                f"what answers at {_endpoint().netloc} is no S3 server: {error}", hint="check TESSERA_S3_ENDPOINT"
            ) from None
        except HTTPError as error:
            raise StoreError(
                f"the S3 server at {_endpoint().netloc} cannot be reached: {getattr(error, 'reason', None) or error}",
                hint="check TESSERA_S3_ENDPOINT and that the server is running",
            ) from None


class _Checked:
    """A file that is hashed while it is sent, and whose last bytes are handed over only if the whole is as expected."""

    def __init__(self, stream: IO[bytes], entry: FileEntry, source: Path) -> None:
        self._stream, self._entry, self._source = stream, entry, source
        self._sha, self._left = hashlib.sha256(), entry.size

    def read(self, size: int = -1) -> bytes:
        """The next bytes; StoreError at the end of a file that changed."""
        fault_point("s3.part")
        chunk = self._stream.read(size)
        self._sha.update(chunk)
        self._left -= len(chunk)
        if (self._left <= 0 or not chunk) and self._sha.hexdigest() != self._entry.sha256:
            raise changed_meanwhile(self._source)
        return chunk


def _refusal(code: str, message: str, bucket: str, size: int) -> StoreError:
    """The error for a server's refusal."""
    if code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden", "ExpiredToken"):
        return StoreError(
            f"the S3 server refuses these credentials for bucket {bucket!r} ({code})",
            hint="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they may use the bucket",
        )
    if code == "NoSuchBucket":
        return StoreError(f"there is no bucket {bucket!r}", hint="create it, or check --store")
    if code in ("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"):
        return StoreError(
            f"no space left in bucket {bucket!r}: {size:,} bytes are needed ({code})",
            hint="free some, run `tessera store gc`, or name another --store",
        )
    return StoreError(f"the S3 server answers {code}: {message}")


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


def _http_client() -> Any:
    """Connections with a time limit, and retries with growing pauses."""
    import urllib3

    retry = urllib3.Retry(total=RETRIES, backoff_factor=BACKOFF_S, status_forcelist=[500, 502, 503, 504])
    return urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=60), maxsize=16, retries=retry)


def _whole_mebibytes(size: float) -> int:
    """`size` rounded up to a multiple of 1 MiB."""
    return -(-int(size) // (1 << 20)) * (1 << 20)


_DIGEST = "sha256"
_DIGEST_HEADER = f"x-amz-meta-{_DIGEST}"
_ABSENT = ("NoSuchKey", "NoSuchObject", "ResourceNotFound")
