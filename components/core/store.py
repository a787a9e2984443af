"""The store: artifacts by digest, records of finished stages, resume points, documents of runs.

    blobs/sha256/ab/abc…      file contents, immutable        artifacts/<digest>.json   manifests
    stages/<key>.json         what a finished stage made      resume/<key>/<step>/…     resume points
    runs/<run>/…              records of runs, small JSON and text

Order of writing: blobs, manifest, stage record. Each is complete or absent, so whatever a reader finds named is there.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from components.core.artifacts import FileEntry, Kind, Manifest, describe, hash_file
from components.core.backends import Backend, FolderBackend, open_backend
from components.core.config import Config
from components.core.errors import CorruptArtifact, StoreError

TRANSFERS = 4
"""Files moved at a time."""
GRACE_S = 3600.0
"""Age below which unreferenced objects are left alone: a writer may be about to name them."""


class StageRecord(Config):
    """What a finished stage made of what."""

    key: str
    """Name of the computation."""
    stage: str
    """Name of the stage."""
    config: dict[str, JsonValue]
    """Canonical configuration."""
    code: str
    """Digest of the code behind the stage."""
    libraries: dict[str, str] = {}
    """Versions of the libraries that can change a number."""
    inputs: dict[str, str | list[str]] = {}
    """Digest of each input artifact."""
    outputs: dict[str, str] = {}
    """Digest of each output artifact."""
    result: dict[str, JsonValue] = {}
    """Small facts that the stage returned."""
    seconds: float = 0.0
    """Time the computation took, s."""


class Store:
    """Artifacts and records behind one address; `local` keeps working copies on this machine."""

    def __init__(self, uri: str, backend: Backend, local: Path) -> None:
        self.uri = uri
        self.local = local
        self.backend = backend
        self._whole: set[str] = set()
        """Blobs whose bytes this process has verified."""

    # Artifacts

    def put_folder(self, folder: Path, kind: Kind, metadata: Mapping[str, JsonValue] | None = None) -> Manifest:
        """Store the files below a folder as an artifact; contents that are there already are not sent again."""
        manifest = describe(folder, kind, dict(metadata or {}))
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda item: self.backend.put_file(_blob(item[1].sha256), folder / item[0]), manifest.files.items()))
        self.backend.put(f"artifacts/{manifest.digest}.json", _json(manifest.model_dump(mode="json")), if_absent=True)
        return manifest

    def manifest(self, digest: str) -> Manifest:
        """The manifest of an artifact.

        Raises:
            StoreError: there is no such artifact.
            CorruptArtifact: the manifest is not the one that the digest names.
        """
        data = self.backend.get(f"artifacts/{digest}.json")
        if data is None:
            raise StoreError(f"there is no artifact {digest[:12]} in {self.uri}", hint="check --store")
        try:
            manifest = Manifest.model_validate_json(data)
        except ValueError:
            manifest = None
        if manifest is None or manifest.digest != digest:
            raise CorruptArtifact(f"the manifest of artifact {digest[:12]} was changed", hint=_MEND)
        return manifest

    def fetch(self, digest: str) -> Path:
        """The files of an artifact in a local, read-only folder, every byte verified.

        Raises:
            StoreError: there is no such artifact, or no space for it.
            CorruptArtifact: contents differ from their digest.
        """
        manifest, target = self.manifest(digest), self.local / "artifacts" / digest
        if target.is_dir() and all(self._same(target / name, entry) for name, entry in manifest.files.items()):
            return target
        fresh = target.with_name(f"{digest}.{uuid.uuid4().hex}.partial")
        try:
            for name, entry in manifest.files.items():
                self._materialise(digest, name, entry, fresh / name)
            fresh.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was first with the same files
                fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return target

    def read(self, digest: str, name: str) -> bytes:
        """One small file of an artifact, verified, without bringing the others along.

        Raises:
            StoreError: there is no such artifact or file.
            CorruptArtifact: the contents differ from their digest.
        """
        entry = self.manifest(digest).files.get(name)
        data = None if entry is None else self.backend.get(_blob(entry.sha256))
        if entry is None or data is None:
            raise StoreError(f"file {name} of artifact {digest[:12]} is missing in {self.uri}", hint=_MEND)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CorruptArtifact(f"file {name} of artifact {digest[:12]} was changed", hint=_MEND)
        return data

    def verify(self, digest: str) -> None:
        """Read every byte of an artifact in the store.

        Raises:
            StoreError: the artifact or one of its files is not there.
            CorruptArtifact: a file differs in size or digest.
        """
        for name, entry in self.manifest(digest).files.items():
            if entry.sha256 in self._whole:
                continue
            if self.backend.size(_blob(entry.sha256)) is None:
                raise StoreError(f"file {name} of artifact {digest[:12]} is missing in {self.uri}", hint=_MEND)
            if isinstance(self.backend, FolderBackend):
                self._check(digest, name, entry, self.backend.root / _blob(entry.sha256))
            else:
                copy = self.local / "tmp" / uuid.uuid4().hex
                try:
                    self.backend.get_file(_blob(entry.sha256), copy)
                    self._check(digest, name, entry, copy)
                finally:
                    copy.unlink(missing_ok=True)

    def _materialise(self, digest: str, name: str, entry: FileEntry, target: Path) -> None:
        """Bring one file to `target`, verified."""
        try:
            self.backend.get_file(_blob(entry.sha256), target)
        except FileNotFoundError:
            raise StoreError(f"file {name} of artifact {digest[:12]} is missing in {self.uri}", hint=_MEND) from None
        self._check(digest, name, entry, target)
        target.chmod(0o444)

    def _check(self, digest: str, name: str, entry: FileEntry, path: Path) -> None:
        """Compare a file with its entry; bytes are read once a process."""
        if entry.sha256 in self._whole and path.stat().st_size == entry.size:
            return
        found = hash_file(path)
        if found != entry:
            raise CorruptArtifact(
                f"file {name} of artifact {digest[:12]} was changed: sha256 {entry.sha256[:12]}… of {entry.size} bytes "
                f"expected, {found.sha256[:12]}… of {found.size} found",
                hint=_MEND,
            )
        self._whole.add(entry.sha256)

    def _same(self, path: Path, entry: FileEntry) -> bool:
        """Whether a local copy is whole."""
        if not path.is_file() or path.stat().st_size != entry.size:
            return False
        if entry.sha256 not in self._whole:
            if hash_file(path) != entry:
                return False
            self._whole.add(entry.sha256)
        return True

    # Finished stages

    def stage_record(self, key: str) -> StageRecord | None:
        """The record of a finished stage."""
        data = self.backend.get(f"stages/{key}.json")
        return None if data is None else StageRecord.model_validate_json(data)

    def put_stage_record(self, record: StageRecord) -> StageRecord:
        """Record a finished stage. Returns the record that holds: another writer's, if it came first and its outputs are whole."""
        path, data = f"stages/{record.key}.json", _json(record.model_dump(mode="json"))
        if self.backend.put(path, data, if_absent=True):
            return record
        first = self.stage_record(record.key)
        if first is not None and first.outputs == record.outputs:
            return first
        with contextlib.suppress(StoreError, CorruptArtifact):
            if first is not None:
                for digest in first.outputs.values():
                    self.verify(digest)
                return first
        self.backend.put(path, data)
        return record

    def stage_records(self) -> Iterator[StageRecord]:
        """All records of finished stages."""
        for path in self.backend.list("stages/"):
            data = self.backend.get(path)
            if data is not None:
                yield StageRecord.model_validate_json(data)

    # Resume points

    def resume_folder(self, key: str) -> Path:
        """The local folder of a key's resume points; points of a remote store are brought there first."""
        folder = self._resume_root() / key
        folder.mkdir(parents=True, exist_ok=True)
        if not isinstance(self.backend, FolderBackend):
            self._pull_resume(key, folder)
        return folder

    def push_resume(self, key: str, point: Path) -> None:
        """Copy a whole local point to a remote store: its files, then the list that makes it count; older points go."""
        if isinstance(self.backend, FolderBackend):
            return
        manifest = describe(point, "table")
        for name in manifest.files:
            self.backend.put(f"resume/{key}/{point.name}/{name}", (point / name).read_bytes())
        self.backend.put(f"resume/{key}/{point.name}.json", _json(manifest.model_dump(mode="json")))
        for path in list(self.backend.list(f"resume/{key}/")):
            if path.split("/")[2].partition(".")[0] < point.name:
                self.backend.delete(path)

    def drop_resume(self, key: str) -> None:
        """Remove all resume points of a finished stage."""
        shutil.rmtree(self._resume_root() / key, ignore_errors=True)
        if not isinstance(self.backend, FolderBackend):
            for path in list(self.backend.list(f"resume/{key}/")):
                self.backend.delete(path)

    def _resume_root(self) -> Path:
        return self.backend.root / "resume" if isinstance(self.backend, FolderBackend) else self.local / "resume"

    def _pull_resume(self, key: str, folder: Path) -> None:
        """Bring the newest whole point of a remote store."""
        lists = [path for path in self.backend.list(f"resume/{key}/") if path.count("/") == 2 and path.endswith(".json")]
        for path in reversed(lists):
            point = folder / Path(path).stem
            manifest = Manifest.model_validate_json(self.backend.get(path) or b"{}")
            if not point.is_dir():
                fresh = folder / f".{point.name}.{os.getpid()}.partial"
                for name in manifest.files:
                    self.backend.get_file(f"resume/{key}/{point.name}/{name}", fresh / name)
                fresh.rename(point)
            if describe(point, "table").files == manifest.files:
                return
            shutil.rmtree(point)

    # Documents of runs

    def put_document(self, path: str, value: JsonValue | Mapping[str, Any]) -> None:
        """Write small JSON, replacing what was there at once."""
        self.backend.put(path, _json(value))

    def document(self, path: str) -> Any:
        """Small JSON, None where nothing is."""
        data = self.backend.get(path)
        return None if data is None else json.loads(data)

    def documents(self, prefix: str) -> list[str]:
        """Paths below a prefix that ends with a slash."""
        return list(self.backend.list(prefix))

    def claim(self, path: str, value: JsonValue | Mapping[str, Any]) -> bool:
        """Write small JSON where nothing is; False where something was."""
        return self.backend.put(path, _json(value), if_absent=True)

    def put_text(self, path: str, text: str) -> None:
        """Write a text, replacing what was there at once."""
        self.backend.put(path, text.encode())

    def text(self, path: str) -> str | None:
        """A text, None where nothing is."""
        data = self.backend.get(path)
        return None if data is None else data.decode()

    # Upkeep

    def gc(self, *, dry_run: bool = False) -> dict[str, int]:
        """Remove what no finished stage and no run refers to: manifests, blobs, local copies.

        Returns:
            How many `artifacts`, `blobs` and `bytes` were removed, or would be.
        """
        live = {digest for record in self.stage_records() for digest in _digests_of(record)} | self._sources()
        manifests = [path for path in self.backend.list("artifacts/") if self._old(path)]
        dead = [path for path in manifests if Path(path).stem not in live]
        kept = [path for path in self.backend.list("artifacts/") if path not in set(dead)]
        needed = {entry.sha256 for path in kept for entry in self.manifest(Path(path).stem).files.values()}
        blobs = [path for path in self.backend.list("blobs/") if Path(path).name not in needed and self._old(path)]
        freed = sum(self.backend.size(path) or 0 for path in blobs)
        if not dry_run:
            for path in dead:
                shutil.rmtree(self.local / "artifacts" / Path(path).stem, ignore_errors=True)
            for path in [*dead, *blobs]:
                self.backend.delete(path)
        return {"artifacts": len(dead), "blobs": len(blobs), "bytes": freed}

    def verify_all(self) -> dict[str, str]:
        """Check every artifact; digest to what is wrong with it, empty where all is well."""
        wrong: dict[str, str] = {}
        for path in self.backend.list("artifacts/"):
            try:
                self.verify(Path(path).stem)
            except (StoreError, CorruptArtifact) as error:
                wrong[Path(path).stem] = error.message
        return wrong

    def _sources(self) -> set[str]:
        """Artifacts that runs were started from."""
        found: set[str] = set()
        for path in self.backend.list("runs/"):
            if path.endswith("/run.json"):
                found |= set((self.document(path) or {}).get("sources", {}).values())
        return found

    def _old(self, path: str) -> bool:
        """Whether an object is older than the grace period."""
        if isinstance(self.backend, FolderBackend):
            return time.time() - (self.backend.root / path).stat().st_mtime > GRACE_S
        stat = self.backend.client.stat_object(self.backend.bucket, self.backend.prefix + path)  # type: ignore[attr-defined]
        return time.time() - stat.last_modified.timestamp() > GRACE_S


_MEND = "run the recipe again: stages whose results are damaged are computed anew; `tessera store verify` lists all damage"


def open_store(uri: str | Path, *, local: Path | None = None) -> Store:
    """Open a store.

    Args:
        uri: a folder, made on first use, or `s3://bucket/prefix`.
        local: where working copies go; inside a folder store, else `.tessera/local`.
    """
    backend = open_backend(str(uri))
    if isinstance(backend, FolderBackend):
        return Store(str(backend.root), backend, local or backend.root / "local")
    return Store(str(uri), backend, local or Path(".tessera/local").absolute())


def _blob(sha256: str) -> str:
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def _json(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def _digests_of(record: StageRecord) -> Iterator[str]:
    """Artifacts that a record names."""
    yield from record.outputs.values()
    for value in record.inputs.values():
        yield from value if isinstance(value, list) else [value]
