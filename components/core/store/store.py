"""The store: artifacts by digest, records of finished stages, checkpoints, documents of runs.

    blobs/, artifacts/        see `artifact_store.py`
    resume/                   see `checkpoint_store.py`
    stages/<key>.json         outputs of a finished stage
    runs/<run>/…              records of runs, small JSON and text

Order of writing: blobs, manifest, stage record. Each is complete or absent, so every object that a reader finds in a
record exists. Stage records and documents carry a checksum (`checksummed_json.py`); a changed one is never used.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue

from components.core.base.config import Config, digest_of
from components.core.base.errors import CorruptArtifact, StoreError
from components.core.base.fault_injection import fault_point
from components.core.store.artifact_store import REPAIR_HINT
from components.core.store.bucket import SCHEMES
from components.core.store.bucket_store import BucketStore
from components.core.store.checkpoint_store import CheckpointStore
from components.core.store.checksummed_json import seal, unseal
from components.core.store.folder_store import FolderStore
from components.core.store.object_store import ObjectStore

LOCAL_FOLDER = "TESSERA_LOCAL"
"""Environment variable with the folder of working copies of object stores."""


def key_of(
    *,
    stage: str,
    code: str,
    libraries: Mapping[str, str],
    config: Mapping[str, JsonValue],
    inputs: Mapping[str, str | list[str]],
    device: str | None = None,
) -> str:
    """Cache key of a stage: hash of its name, code, canonical configuration, inputs, and the device of its times."""
    present = {name: value for name, value in sorted(inputs.items()) if value}
    measured = {} if device is None else {"device": device}
    fields = {"stage": stage, "code": code, "libraries": libraries, "config": config, "inputs": present}
    return digest_of(fields | measured)


def digests_by_name(inputs: Mapping[str, str | list[str]]) -> dict[str, str]:
    """Inputs with each list spread, so that every name has one digest: `libraries[0]`, `libraries[1]` and so on."""
    single = {name: value for name, value in inputs.items() if not isinstance(value, list)}
    lists = {name: value for name, value in inputs.items() if isinstance(value, list)}
    return single | {f"{name}[{number}]": each for name, value in lists.items() for number, each in enumerate(value)}


class StageRecord(Config):
    """A finished stage: its inputs, configuration and outputs."""

    key: str
    """Cache key, see `key_of`."""
    stage: str
    """Name of the stage."""
    config: dict[str, JsonValue]
    """Canonical configuration."""
    code: str
    """Digest of the code behind the stage."""
    libraries: dict[str, str] = Field(default_factory=dict)
    """Versions of the libraries that can change a number."""
    inputs: dict[str, str | list[str]] = Field(default_factory=dict)
    """Digest of each input artifact."""
    device: str | None = None
    """The processors that the times in its outputs were measured on; None if it measures no time."""
    outputs: dict[str, str] = Field(default_factory=dict)
    """Digest of each output artifact."""
    result: dict[str, JsonValue] = Field(default_factory=dict)
    """Small values that the stage returned."""
    seconds: float = 0.0
    """Duration with fetching of inputs and storing of outputs, s."""
    work_seconds: float = 0.0
    """Part of `seconds` in the stage's own code, s."""
    peak_memory_bytes: int | None = None
    """Peak of the largest of its processes, resident; where it ran on GPUs, of its tensors on one of them. None where
    it was not measured."""

    @property
    def derived_key(self) -> str:
        """The key computed from the other fields."""
        return key_of(
            stage=self.stage,
            code=self.code,
            libraries=self.libraries,
            config=self.config,
            inputs=self.inputs,
            device=self.device,
        )


class Store(CheckpointStore):
    """All persistent data of runs, at one address."""

    # Finished stages

    def stage_record(self, key: str) -> StageRecord | None:
        """The record of a finished stage; None if it is absent or was changed."""
        with contextlib.suppress(CorruptArtifact):
            return self.checked_record(key)
        return None

    def checked_record(self, key: str) -> StageRecord | None:
        """The record of a finished stage; None if it has not finished.

        Raises:
            CorruptArtifact: the record was changed, or is from another computation than its path says.
        """
        path = record_path(key)
        try:
            data = self.backend.get(path)
            record = None if data is None else StageRecord.model_validate(unseal(path, data))
            derived = key if record is None else record.derived_key
        except (ValueError, CorruptArtifact):
            raise CorruptArtifact(f"the record of stage {key[:12]} was changed", hint=REPAIR_HINT) from None
        if record is not None and not key == record.key == derived:
            raise CorruptArtifact(
                f"the record of stage {key[:12]} is of another computation: {derived[:12]}", hint=REPAIR_HINT
            )
        return record

    def put_stage_record(self, record: StageRecord) -> StageRecord:
        """Record a finished stage after its outputs were stored. The first of two writers wins.

        Returns:
            The stored record: another writer's if it was first and its outputs are undamaged.
        """
        path = record_path(record.key)
        data = seal(path, record.model_dump(mode="json"))
        fault_point("record.write")
        if self.backend.put(path, data, if_absent=True):
            fault_point("record.written")
            return record
        first = self.stage_record(record.key)
        if first is not None and (first.outputs == record.outputs or self._is_usable(first, record)):
            return first
        self.backend.put(path, data)
        return record

    def stage_records(self) -> Iterator[StageRecord]:
        """All records of finished stages."""
        for found in self.backend.list("stages/"):
            if (record := self.stage_record(Path(found.path).stem)) is not None:
                yield record

    def _is_usable(self, first: StageRecord, record: StageRecord) -> bool:
        """Whether the outputs of the first writer are undamaged, and of the same kinds as those of the second."""
        try:
            kinds = {name: self.manifest(digest).kind for name, digest in record.outputs.items()}
            return kinds == {name: self.verify(digest).kind for name, digest in first.outputs.items()}
        except (StoreError, CorruptArtifact):
            return False

    # Documents of runs

    def put_document(self, path: str, value: Mapping[str, Any]) -> None:
        """Write a small JSON object; an existing one is replaced atomically."""
        self.backend.put(path, seal(path, value))

    def document(self, path: str) -> Any:
        """A small JSON object, None if it is absent.

        Raises:
            CorruptArtifact: the document was changed.
        """
        try:
            data = self.backend.get(path)
            return None if data is None else unseal(path, data)
        except (ValueError, CorruptArtifact):
            raise CorruptArtifact(
                f"{path} in {self.uri} was changed", hint="run the recipe again, or remove this file; artifacts stay"
            ) from None

    def read_document_or_none(self, path: str) -> Any:
        """Like `document`, but None for a changed one too: for lists that must work despite a damaged document."""
        with contextlib.suppress(CorruptArtifact):
            return self.document(path)
        return None

    def documents(self, prefix: str) -> list[str]:
        """Paths below a prefix that ends with a slash."""
        return [found.path for found in self.backend.list(prefix)]

    def claim(self, path: str, value: Mapping[str, Any]) -> bool:
        """Write a small JSON object if it is absent; returns whether it was written."""
        return self.backend.put(path, seal(path, value), if_absent=True)

    def put_text(self, path: str, text: str) -> None:
        """Write a text; an existing one is replaced atomically."""
        self.backend.put(path, text.encode())

    def text(self, path: str) -> str | None:
        """A text, None if it is absent."""
        data = self.backend.get(path)
        return None if data is None else data.decode()


def open_store(uri: str | Path, *, local: Path | None = None) -> Store:
    """Open a store; nothing is written or requested yet.

    Args:
        uri: a folder, created on first use, or an address with `s3://`, `gs://` or `az://`.
        local: folder of working copies. Default: `local` in a folder store, else `<bucket>/<prefix>` in the folder that
            the environment variable `TESSERA_LOCAL` names, or in `.tessera/local`.
    """
    backend = open_object_store(str(uri))
    if backend.folder is not None:
        return Store(str(backend.folder), backend, local or backend.folder / "local")
    location = str(uri).partition("://")[2].strip("/")
    return Store(str(uri), backend, local or Path(os.environ.get(LOCAL_FOLDER, ".tessera/local"), location).absolute())


def open_object_store(uri: str) -> ObjectStore:
    """The objects at an address: a folder, or `s3://bucket/prefix`, or the same with `gs` or `az`.

    Raises:
        StoreError: another scheme, no bucket, or a prefix that would not be stored as written.
    """
    scheme, separator, location = uri.partition("://")
    hint = "a store is a folder or s3://bucket/prefix, or the same with gs:// or az://"
    if separator:
        if scheme not in SCHEMES:
            raise StoreError(f"{uri} is no store", hint=hint)
        if location[:1] in ("", "/"):
            raise StoreError(f"{uri} names no bucket", hint="write s3://bucket/prefix")
        return BucketStore(uri)
    root = Path(uri).absolute()
    if root.exists() and not root.is_dir():
        raise StoreError(f"{uri} is a file", hint=hint)
    return FolderStore(root)


def record_path(key: str) -> str:
    """Path of the record of a finished stage."""
    return f"stages/{key}.json"
