"""Prepares a store: creates its bucket, sets the lifecycle rule, and checks each kind of access on a probe object."""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from components.core.base.errors import StoreError
from components.core.store.bucket import UPLOAD_DAYS, Bucket
from components.core.store.bucket_store import BucketStore
from components.core.store.object_store import ObjectStore
from components.core.store.store import open_object_store


class SetupStep(NamedTuple):
    """One line for the user."""

    name: str
    result: str
    passed: bool = True


def init_store(uri: str) -> Iterator[SetupStep]:
    """Create and check a store, step by step. A store that exists is only checked.

    Args:
        uri: a folder, or an address with `s3://`, `gs://` or `az://`. Only S3 buckets are created.

    Raises:
        StoreError: the address is wrong, or the bucket cannot be created.
    """
    backend = open_object_store(uri)
    if isinstance(backend, BucketStore) and backend.bucket.scheme == "s3":
        yield _create_bucket(backend.bucket)
        yield _set_lifecycle_rule(backend.bucket)
    yield from _check_access(backend)


def _create_bucket(bucket: Bucket) -> SetupStep:
    created = bucket.create()
    return SetupStep("bucket", f"{bucket.name} at {bucket.host} {'created' if created else 'exists'}")


def _set_lifecycle_rule(bucket: Bucket) -> SetupStep:
    """A store works without the rule, so a server that refuses it is not a failure."""
    try:
        bucket.expire_abandoned_uploads()
    except StoreError as error:
        return SetupStep("lifecycle rule", f"{error.message}; {error.hint}")
    return SetupStep("lifecycle rule", f"abandoned uploads end after {UPLOAD_DAYS} days")


def _check_access(backend: ObjectStore) -> Iterator[SetupStep]:
    """Write, read, create conditionally, list and delete a probe object, which never stays."""
    path, data = f"probe-{uuid.uuid4().hex}", b"tessera"

    def write() -> None:
        backend.put(path, data)

    def read() -> str | None:
        return None if backend.get(path) == data else "the probe object does not have the bytes that were written"

    def create_conditionally() -> str | None:
        is_overwritten = backend.put(path, b"other", if_absent=True) or backend.get(path) != data
        return (
            "an existing object is overwritten, so two writers of one record would both win" if is_overwritten else None
        )

    def list_objects() -> None:
        list(backend.list("stages/"))

    def delete() -> str | None:
        backend.delete(path)
        return None if backend.get(path) is None else "the probe object is still there"

    checks: dict[str, Callable[[], str | None]] = {
        "write": write,
        "read": read,
        "conditional create": create_conditionally,
        "list": list_objects,
        "delete": delete,
    }
    try:
        for name, check in checks.items():
            try:
                fault = check()
            except StoreError as error:
                fault = f"{error.message}; {error.hint}" if error.hint else error.message
            yield SetupStep(name, f"failed: {fault}" if fault else "allowed", passed=fault is None)
            if name == "write" and fault:
                return
    finally:
        with contextlib.suppress(StoreError):
            backend.delete(path)
