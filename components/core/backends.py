"""Where bytes live: a folder, or a bucket behind S3's API. Each operation is complete or without effect."""

import contextlib
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlparse

from components.core.errors import StoreError

PART_BYTES = 16 << 20
"""Size of a part of a multipart upload: with three parts at a time, memory stays below 64 MiB a transfer."""

Result = TypeVar("Result")


class Backend(Protocol):
    """Objects by path. Paths are relative and POSIX."""

    def put_file(self, path: str, source: Path) -> None:
        """Store a file's contents; an object that is there already stays as it is."""

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Store small data; with `if_absent` only where nothing is, False where something was."""

    def get(self, path: str) -> bytes | None:
        """Small data, None where nothing is."""

    def get_file(self, path: str, target: Path) -> None:
        """Copy an object's contents to a new file. Raises FileNotFoundError where nothing is."""

    def size(self, path: str) -> int | None:
        """Bytes of an object, None where nothing is."""

    def list(self, prefix: str) -> Iterator[str]:
        """Paths below a prefix that ends with a slash, sorted."""

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens where nothing is."""


class FolderBackend:
    """Objects are files below a root; blobs are read-only and may be linked from elsewhere."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put_file(self, path: str, source: Path) -> None:
        """Copy, flush to the disk, then rename."""
        if self._at(path).exists():
            return
        with self._whole(path, source.stat().st_size) as partial:
            shutil.copyfile(source, partial)

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write beside, flush, then rename, or link where only one may win."""
        if if_absent:
            if self._at(path).exists():
                return False
            with self._partial(path, len(data)) as partial:
                partial.write_bytes(data)
                _flush(partial)
                try:
                    os.link(partial, self._at(path))
                except FileExistsError:
                    return False
            return True
        with self._whole(path, len(data)) as partial:
            partial.write_bytes(data)
        return True

    def get(self, path: str) -> bytes | None:
        """Read a file."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return self._at(path).read_bytes()
        return None

    def get_file(self, path: str, target: Path) -> None:
        """Link where both are on one file system, else copy."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(self._at(path), target)
        except FileNotFoundError:
            raise
        except OSError:
            with _space_for(target.parent, self._at(path).stat().st_size):
                shutil.copyfile(self._at(path), target)

    def size(self, path: str) -> int | None:
        """Size of a file."""
        with contextlib.suppress(FileNotFoundError):
            return self._at(path).stat().st_size
        return None

    def list(self, prefix: str) -> Iterator[str]:
        """Files below a folder; half-written ones do not count."""
        found = (path for path in self._at(prefix).rglob("*") if path.is_file() and not path.name.startswith(".partial-"))
        yield from sorted(path.relative_to(self.root).as_posix() for path in found)

    def delete(self, path: str) -> None:
        """Unlink a file."""
        self._at(path).unlink(missing_ok=True)

    def _at(self, path: str) -> Path:
        return self.root / path

    @contextlib.contextmanager
    def _partial(self, path: str, size: int) -> Iterator[Path]:
        """A file of another name beside the target, removed afterwards."""
        target = self._at(path)
        with _space_for(self.root, size):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".partial-", dir=target.parent)
            os.close(handle)
            try:
                yield Path(name)
            finally:
                Path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _whole(self, path: str, size: int) -> Iterator[Path]:
        """A file of another name that takes the target's place once it is written and flushed."""
        with self._partial(path, size) as partial:
            yield partial
            _flush(partial)
            partial.chmod(0o444 if path.startswith("blobs/") else 0o644)
            partial.rename(self._at(path))


class S3Backend:
    """Objects of a bucket below a prefix, through the MinIO client."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""

    @functools.cached_property
    def client(self) -> Any:
        """The MinIO client, made on first use; the bucket is checked then.

        Raises:
            StoreError: no endpoint or credentials in the environment, or the bucket cannot be reached.
        """
        from minio import Minio

        endpoint = _setting("TESSERA_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MINIO_ENDPOINT")
        key = _setting("AWS_ACCESS_KEY_ID", "MINIO_ACCESS_KEY", "MINIO_ROOT_USER")
        secret = _setting("AWS_SECRET_ACCESS_KEY", "MINIO_SECRET_KEY", "MINIO_ROOT_PASSWORD")
        url = urlparse(endpoint if "://" in endpoint else f"https://{endpoint}")
        client = Minio(
            url.netloc,
            access_key=key,
            secret_key=secret,
            session_token=os.environ.get("AWS_SESSION_TOKEN"),
            secure=url.scheme == "https",
            region=os.environ.get("AWS_REGION", "us-east-1"),
            http_client=_http_client(),
        )
        if not _explained(lambda: client.bucket_exists(self.bucket), self.bucket):
            raise StoreError(f"there is no bucket {self.bucket!r} at {url.netloc}", hint="create it, or check --store")
        return client

    def put_file(self, path: str, source: Path) -> None:
        """Upload in parts; the object appears when all have arrived."""
        if self.size(path) is None:
            self._call("fput_object", self.prefix + path, str(source), part_size=PART_BYTES)

    def put(self, path: str, data: bytes, *, if_absent: bool = False) -> bool:
        """One request, conditional where only one writer may win."""
        from minio.error import S3Error

        def conditional() -> bool:
            try:
                self.client._put_object(self.bucket, self.prefix + path, data, {"If-None-Match": "*"})
            except S3Error as error:
                if error.code in ("PreconditionFailed", "ConditionalRequestConflict"):
                    return False
                raise
            return True

        if if_absent:
            return _explained(conditional, self.bucket)
        self._call("put_object", self.prefix + path, BytesIO(data), len(data))
        return True

    def get(self, path: str) -> bytes | None:
        """Download small data."""
        if self.size(path) is None:
            return None
        response = self._call("get_object", self.prefix + path)
        try:
            data: bytes = response.read()
        finally:
            response.close()
            response.release_conn()
        return data

    def get_file(self, path: str, target: Path) -> None:
        """Stream to a file."""
        size = self.size(path)
        if size is None:
            raise FileNotFoundError(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _space_for(target.parent, size):
            self._call("fget_object", self.prefix + path, str(target))

    def size(self, path: str) -> int | None:
        """Ask for the object's head."""
        from minio.error import S3Error

        def head() -> int | None:
            try:
                return int(self.client.stat_object(self.bucket, self.prefix + path).size)
            except S3Error as error:
                if error.code in ("NoSuchKey", "NoSuchObject", "ResourceNotFound"):
                    return None
                raise

        return _explained(head, self.bucket)

    def list(self, prefix: str) -> Iterator[str]:
        """List the keys, page by page."""
        for found in self._call("list_objects", prefix=self.prefix + prefix, recursive=True):
            yield found.object_name.removeprefix(self.prefix)

    def delete(self, path: str) -> None:
        """Remove a key."""
        self._call("remove_object", self.prefix + path)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return _explained(lambda: getattr(self.client, method)(self.bucket, *arguments, **options), self.bucket)


def open_backend(uri: str) -> Backend:
    """The backend of a store's address: a folder, or `s3://bucket/prefix`.

    Raises:
        StoreError: another scheme, or no bucket.
    """
    url = urlparse(uri)
    if url.scheme == "s3":
        if not url.netloc:
            raise StoreError(f"{uri} names no bucket", hint="write s3://bucket/prefix")
        return S3Backend(url.netloc, url.path.strip("/"))
    if "://" in uri:
        raise StoreError(f"{uri}: a store is a folder or s3://bucket/prefix")
    return FolderBackend(Path(uri).absolute())


def _flush(path: Path) -> None:
    """Have the file's contents on the disk before it gets its name."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _space_for(folder: Path, size: int) -> Iterator[None]:
    """Say how much room is missing where a write fails for lack of it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        raise StoreError(
            f"no space left at {folder}: {size:,} bytes are needed, {free:,} are free",
            hint="free some, run `tessera store gc`, or name another --store",
        ) from None


def _setting(*names: str) -> str:
    """The first of these environment variables that is set."""
    for name in names:
        if os.environ.get(name):
            return os.environ[name]
    raise StoreError(f"an s3:// store needs {names[0]} in the environment", hint=f"set one of {', '.join(names)}")


def _http_client() -> Any:
    """Connections with a time limit, and retries with growing pauses."""
    import urllib3

    retry = urllib3.Retry(total=4, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504])
    return urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=60), maxsize=16, retries=retry)


def _explained(call: Callable[[], Result], bucket: str) -> Result:
    """Call the server, and turn its refusals into errors with a way out."""
    import urllib3
    from minio.error import S3Error

    try:
        return call()
    except S3Error as error:
        if error.code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden"):
            raise StoreError(
                f"the S3 server refuses these credentials for bucket {bucket!r} ({error.code})",
                hint="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they may use the bucket",
            ) from None
        if error.code == "NoSuchBucket":
            raise StoreError(f"there is no bucket {bucket!r}", hint="create it, or check --store") from None
        raise StoreError(f"the S3 server answers {error.code}: {error.message}") from None
    except urllib3.exceptions.HTTPError as error:
        reason = type(getattr(error, "reason", None) or error).__name__
        raise StoreError(
            f"the S3 server cannot be reached ({reason})", hint="check TESSERA_S3_ENDPOINT and that it is running"
        ) from None
