"""The data set's folder: what is in it, since when, and the artifact that is made of it once it is quiet."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path

from components.core.base.config import digest_of
from components.core.base.errors import InputError
from components.core.store.object_store import ObjectInfo, ObjectStore
from components.core.store.store import Store, open_object_store
from pipelines.retraining.status import Dataset


def observe(folder: ObjectStore, before: Dataset | None, now: datetime) -> Dataset:
    """Look at the objects of the folder.

    Args:
        folder: the data set.
        before: the last look. An object that was removed shows in comparison with it alone.
        now: the present time.
    """
    objects = list(folder.list(""))
    fingerprint = digest_of([[each.path, each.size, str(each.stamp)] for each in objects])
    if before is not None and before.fingerprint == fingerprint:
        return before
    if before is None:
        return Dataset(fingerprint=fingerprint, since=_newest(objects, now), objects=len(objects))
    return before.model_copy(update={"fingerprint": fingerprint, "since": now, "objects": len(objects)})


def copy_into_store(folder: ObjectStore, dataset: Dataset, store: Store) -> str:
    """Make an artifact of the files of a folder; returns its digest.

    The files pass through the operator's temporary folder.

    Raises:
        InputError: the folder is empty, or has changed since it was looked at.
    """
    if not dataset.objects:
        raise InputError("the data set's folder is empty", hint="correct trigger.dataset.prefix, or add files")
    with tempfile.TemporaryDirectory(prefix="tessera-") as staging:
        for each in folder.list(""):
            target = Path(staging) / each.path
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.get_file(each.path, target)
        if observe(folder, dataset, dataset.since) != dataset:
            raise InputError("the data set has changed while it was copied", hint="it is copied again once it is quiet")
        return store.put_folder(Path(staging), "data").digest


def open_folder(prefix: str) -> ObjectStore:
    """The folder at an address."""
    return open_object_store(prefix.rstrip("/"))


def _newest(objects: list[ObjectInfo], now: datetime) -> datetime:
    """When the newest object was written; now for an empty folder."""
    return max((datetime.fromtimestamp(each.modified, UTC) for each in objects), default=now)
