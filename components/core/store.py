"""The store: artifacts by digest, records of finished stages, resume points, documents of runs.

    blobs/, artifacts/        see `artifact_store.py`
    stages/<key>.json         what a finished stage made      resume/<key>/<step>/…     resume points
    runs/<run>/…              records of runs, small JSON and text

Order of writing: blobs, manifest, stage record. Each is complete or absent, so whatever a reader finds named is there.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue

from components.core.artifact_store import TRANSFERS, ArtifactStore
from components.core.artifacts import Manifest, describe
from components.core.backends import Stored, open_backend
from components.core.config import Config
from components.core.errors import CorruptArtifact, StoreError
from components.core.faults import fault_point
from components.core.job import discard_folder
from components.core.workspace import sweep

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
    libraries: dict[str, str] = Field(default_factory=dict)
    """Versions of the libraries that can change a number."""
    inputs: dict[str, str | list[str]] = Field(default_factory=dict)
    """Digest of each input artifact."""
    outputs: dict[str, str] = Field(default_factory=dict)
    """Digest of each output artifact."""
    result: dict[str, JsonValue] = Field(default_factory=dict)
    """Small facts that the stage returned."""
    seconds: float = 0.0
    """Time the computation took, s."""


class Store(ArtifactStore):
    """Everything of a run that lasts, behind one address."""

    # Finished stages

    def stage_record(self, key: str) -> StageRecord | None:
        """The record of a finished stage; one that cannot be read counts as absent."""
        data = self.backend.get(_record_path(key))
        with contextlib.suppress(ValueError):
            return None if data is None else StageRecord.model_validate_json(data)
        return None

    def put_stage_record(self, record: StageRecord) -> StageRecord:
        """Record a finished stage, whose outputs are stored.

        Returns:
            The record that holds: another writer's if it came first and what it names is whole.
        """
        path, data = _record_path(record.key), _json(record.model_dump(mode="json"))
        fault_point("record.write")
        if self.backend.put(path, data, if_absent=True):
            fault_point("record.written")
            return record
        first = self.stage_record(record.key)
        if first is not None and (first.outputs == record.outputs or self._outputs_are_whole(first)):
            return first
        self.backend.put(path, data)
        return record

    def stage_records(self) -> Iterator[StageRecord]:
        """All records of finished stages."""
        for found in self.backend.list("stages/"):
            if (record := self.stage_record(Path(found.path).stem)) is not None:
                yield record

    def _outputs_are_whole(self, record: StageRecord) -> bool:
        try:
            for digest in record.outputs.values():
                self.verify(digest)
        except (StoreError, CorruptArtifact):
            return False
        return True

    # Resume points

    def resume_folder(self, key: str) -> Path:
        """The local folder of a key's resume points; the newest whole one of a remote store is brought there first."""
        folder = self._resume_root / key
        folder.mkdir(parents=True, exist_ok=True)
        if self._is_remote:
            self._pull_resume(key, folder)
        return folder

    def push_resume(self, key: str, point: Path) -> None:
        """Copy a whole local point to a remote store: its files, then the list that makes it count; older points go."""
        if not self._is_remote:
            return
        manifest = describe(point, "table")
        fault_point("mirror.begun")
        with ThreadPoolExecutor(TRANSFERS) as pool:
            files = [
                (f"resume/{key}/{point.name}/{name}", point / name, entry) for name, entry in manifest.files.items()
            ]
            list(pool.map(lambda file: self.backend.put_file(*file), files))
        fault_point("mirror.files")
        self.put_document(f"resume/{key}/{point.name}.json", manifest.canonical())
        fault_point("mirror.list")
        for path in self.documents(f"resume/{key}/"):
            if path.split("/")[2].partition(".")[0] < point.name:
                self.backend.delete(path)
        fault_point("mirror.trimmed")

    def drop_resume(self, key: str) -> None:
        """Remove all resume points of a finished stage; one that is half-removed does not count."""
        fault_point("resume.drop")
        for point in (self._resume_root / key).glob("[0-9]*"):
            discard_folder(point)
        fault_point("resume.hidden")
        shutil.rmtree(self._resume_root / key, ignore_errors=True)
        fault_point("resume.dropped")
        if self._is_remote:
            for path in self.documents(f"resume/{key}/"):
                self.backend.delete(path)

    @property
    def _is_remote(self) -> bool:
        return self.backend.folder is None

    @property
    def _resume_root(self) -> Path:
        return (self.backend.folder or self.local) / "resume"

    def _pull_resume(self, key: str, folder: Path) -> None:
        """Bring the newest point of a remote store that is whole; a damaged one is passed over."""
        lists = [path for path in self.documents(f"resume/{key}/") if path.count("/") == 2 and path.endswith(".json")]
        for path in sorted(lists, reverse=True):
            point = folder / Path(path).stem
            with contextlib.suppress(ValueError, FileNotFoundError):
                manifest = Manifest.model_validate_json(self.backend.get(path) or b"")
                if point.is_dir() and describe(point, "table").files == manifest.files:
                    return
                self._pull_point(f"resume/{key}/{point.name}", manifest, point)
                return

    def _pull_point(self, prefix: str, manifest: Manifest, point: Path) -> None:
        """Bring one point. Raises ValueError where its bytes are damaged, FileNotFoundError where some are absent."""
        fresh = point.with_name(f".{point.name}.{os.getpid()}.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        try:
            for name, entry in manifest.files.items():
                if self.backend.get_file(f"{prefix}/{name}", fresh / name) != entry:
                    raise ValueError(name)
            fault_point("pull.filled")
            discard_folder(point)
            fault_point("pull.cleared")
            fresh.rename(point)
            fault_point("pull.named")
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

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
        return [found.path for found in self.backend.list(prefix)]

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
        """Remove what no finished stage and no run refers to: artifacts, blobs, working copies, resume points.

        What is younger than `GRACE_S` stays, so that nothing is taken from under a writer: blobs and manifests that are
        stored again count as new.

        Returns:
            How many `artifacts`, `blobs`, their `bytes`, working `copies` and `resume` points of finished stages were
            removed, or would be.

        Raises:
            CorruptArtifact: a manifest that is referred to cannot be read, so that its blobs are unknown.
        """
        live = self._referred_to()
        manifests = list(self.backend.list("artifacts/"))
        dead = [found for found in manifests if Path(found.path).stem not in live and found.age > GRACE_S]
        kept = {Path(found.path).stem for found in manifests} - {Path(found.path).stem for found in dead}
        needed = {entry.sha256 for digest in kept for entry in self.manifest(digest).files.values()}
        blobs = [
            found
            for found in self.backend.list("blobs/")
            if Path(found.path).name not in needed and found.age > GRACE_S
        ]
        copies = [path for path in self._copies() if path.name not in kept and _age(path) > GRACE_S]
        finished = [key for key in self._resting_keys() if self.stage_record(key) is not None]
        if not dry_run:
            self._delete_if_still_old([*dead, *blobs])
            for path in copies:
                shutil.rmtree(path, ignore_errors=True)
            for key in finished:
                self.drop_resume(key)
            self.backend.discard_partial(GRACE_S)
            sweep(self.local / "tmp")
        freed = sum(found.size for found in blobs)
        counts = {"artifacts": len(dead), "blobs": len(blobs), "bytes": freed}
        return {**counts, "copies": len(copies), "resume": len(finished)}

    def verify_all(self) -> dict[str, str]:
        """Check every artifact that is stored or referred to.

        Returns:
            Digest to what is wrong with it; empty where all is well.
        """
        stored = {Path(found.path).stem for found in self.backend.list("artifacts/")}
        wrong: dict[str, str] = {}
        for digest in sorted(stored | self._referred_to()):
            try:
                self.verify(digest)
            except (StoreError, CorruptArtifact) as error:
                wrong[digest] = error.message
        return wrong

    def _referred_to(self) -> set[str]:
        """Artifacts that a finished stage made or read, or that a run was started from.

        Plain JSON is read here, so that records of another version of this program count too.
        """
        found: set[str] = set()
        for path in self.documents("stages/"):
            record = self.document(path) or {}
            found |= set(record.get("outputs", {}).values())
            for value in record.get("inputs", {}).values():
                found |= set(value if isinstance(value, list) else [value])
        for path in self.documents("runs/"):
            if path.endswith("/run.json"):
                found |= set((self.document(path) or {}).get("sources", {}).values())
        return found

    def _delete_if_still_old(self, objects: list[Stored]) -> None:
        """Remove objects, save those that were stored again in the meantime."""
        for listed in objects:
            found = self.backend.stat(listed.path)
            if found is not None and found.age > GRACE_S:
                self.backend.delete(listed.path)

    def _copies(self) -> list[Path]:
        """Working copies of artifacts, half-made ones too."""
        folder = self.local / "artifacts"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def _resting_keys(self) -> list[str]:
        """Keys whose resume points are all old: none is being computed."""
        youngest: dict[str, float] = {}
        for found in self.backend.list("resume/"):
            key = found.path.split("/")[1]
            youngest[key] = min(found.age, youngest.get(key, found.age))
        return sorted(key for key, age in youngest.items() if age > GRACE_S)


def open_store(uri: str | Path, *, local: Path | None = None) -> Store:
    """Open a store; nothing is written or asked yet.

    Args:
        uri: a folder, made on first use, or `s3://bucket/prefix`.
        local: where working copies go; inside a folder store, else `.tessera/local`.
    """
    backend = open_backend(str(uri))
    if backend.folder is not None:
        return Store(str(backend.folder), backend, local or backend.folder / "local")
    return Store(str(uri), backend, local or Path(".tessera/local").absolute())


def _record_path(key: str) -> str:
    return f"stages/{key}.json"


def _json(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def _age(path: Path) -> float:
    """Seconds since a local folder was last in use."""
    return time.time() - path.stat().st_mtime
