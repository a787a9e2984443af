"""Verification of a store: every record, manifest and byte is read and compared with its digest."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from components.core.base.errors import CorruptArtifact, StoreError
from components.core.store.artifact_store import blob_path
from components.core.store.checkpoint_store import is_valid_checkpoint, parse_checkpoint_manifest
from components.core.store.garbage_collection import DIGEST, children, map_concurrently
from components.core.store.manifest import Kind, Manifest
from components.core.store.object_store import ObjectInfo
from components.core.store.store import StageRecord, Store, digests_by_name

DOCUMENTS = ("runs/", "curves/", "signatures/")
"""Prefixes of documents with a checksum."""
_MAX_NAMED_FILES = 3
"""Files of a damaged artifact that the message names; it counts the others."""


def find_faults(
    store: Store, kinds: Mapping[str, Mapping[str, Kind]] | None = None, *, contents: bool = True
) -> dict[str, str]:
    """Check blobs, manifests, stage records, records of runs, checkpoints and working copies.

    Args:
        store: the store to check.
        kinds: expected kind of each output of each stage.
        contents: read every byte of blobs and checkpoints; otherwise check only manifests, records and sizes.

    Returns:
        Description of each fault, by digest of a blob or artifact, key of a stage record, or path of any other
        object. Empty if there is no damage.
    """
    return _Inspection(store, kinds or {}, contents).faults()


@dataclass
class _Inspection:
    """One pass over a store."""

    store: Store
    kinds: Mapping[str, Mapping[str, Kind]]
    contents: bool
    damage: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each valid blob."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Manifests of the stored artifacts."""

    def faults(self) -> dict[str, str]:
        """Description of each fault, by name."""
        self._blobs()
        self._artifacts()
        self._stage_records()
        self._documents()
        self._checkpoints()
        self._working_copies()
        return dict(sorted(self.damage.items()))

    def _blobs(self) -> None:
        """Check that each blob has the digest in its name, also those that no manifest names."""
        found = list(self.store.backend.list("blobs/"))
        for blob, fault in zip(found, map_concurrently(self._blob_fault, found), strict=True):
            name = Path(blob.path).name
            if fault is not None:
                self.damage[name] = fault
            else:
                self.sizes[name] = blob.size

    def _blob_fault(self, blob: ObjectInfo) -> str | None:
        name = Path(blob.path).name
        if blob.path != blob_path(name) or not DIGEST.fullmatch(name.encode()):
            return f"{blob.path} is no blob"
        if self.contents and not self.store.is_valid_blob(name, blob):
            return f"blob {name} was changed: its bytes have another digest, or cannot be read"
        return None

    def _artifacts(self) -> None:
        """Check that each manifest has the digest in its name, and that its files exist."""
        found = [Path(stored.path).stem for stored in self.store.backend.list("artifacts/")]
        for digest, manifest in zip(found, map_concurrently(self._manifest, found), strict=True):
            if manifest is None:
                continue
            self.manifests[digest] = manifest
            faults = [
                f"{name} ({entry.sha256[:12]})"
                for name, entry in manifest.files.items()
                if self.sizes.get(entry.sha256) != entry.size
            ]
            if faults:
                more = f" and {len(faults) - _MAX_NAMED_FILES} more" if len(faults) > _MAX_NAMED_FILES else ""
                named = ", ".join(faults[:_MAX_NAMED_FILES])
                self.damage[digest] = f"artifact {digest}: changed or missing in {self.store.uri}: {named}{more}"

    def _manifest(self, digest: str) -> Manifest | None:
        try:
            return self.store.manifest(digest)
        except (CorruptArtifact, StoreError) as error:
            self.damage[digest] = error.message
        return None

    def _stage_records(self) -> None:
        """Check that each record is unchanged, has the right key, and names existing artifacts of the right kind."""
        found = [Path(stored.path).stem for stored in self.store.backend.list("stages/")]
        for record in filter(None, map_concurrently(self._record, found)):
            self._require_artifacts((*record.outputs.values(), *digests_by_name(record.inputs).values()))
            declared = self.kinds.get(record.stage)
            if declared is not None:
                self._require_kinds(record, declared)

    def _require_kinds(self, record: StageRecord, declared: Mapping[str, Kind]) -> None:
        """Check the kinds of a stage's outputs."""
        for name, digest in record.outputs.items():
            kind = self.manifests[digest].kind if digest in self.manifests else None
            if kind is not None and kind != declared.get(name):
                self.damage[record.key] = (
                    f"the record of stage {record.key[:12]} has the {kind} {digest[:12]} as {name} of {record.stage}"
                )

    def _record(self, key: str) -> StageRecord | None:
        try:
            return self.store.checked_record(key)
        except CorruptArtifact as error:
            self.damage[key] = error.message
        return None

    def _documents(self) -> None:
        """Check that each document is unchanged, and that the sources of each run exist."""
        found = [path for prefix in DOCUMENTS for path in self.store.documents(prefix)]
        paths = [path for path in found if path.endswith(".json")]
        for path, document in zip(paths, map_concurrently(self._document, paths), strict=True):
            if path.endswith("/run.json") and document is not None:
                self._require_artifacts(document.get("sources", {}).values())

    def _document(self, path: str) -> "Mapping[str, Mapping[str, str]] | None":
        try:
            found: Mapping[str, Mapping[str, str]] | None = self.store.document(path)
        except CorruptArtifact as error:
            self.damage[path] = error.message
            return None
        return found

    def _require_artifacts(self, digests: Iterable[str]) -> None:
        """Report artifacts that are referenced and do not exist."""
        for digest in digests:
            if digest not in self.manifests and digest not in self.damage:
                self.damage[digest] = f"there is no artifact {digest[:12]} in {self.store.uri}"

    def _checkpoints(self) -> None:
        """Check that each complete checkpoint equals what was saved, on this machine and in a remote store."""
        for name, is_valid in (*self._local_checkpoints(), *self._remote_checkpoints()):
            if self.contents and not is_valid():
                self.damage[name] = f"{name} was changed; the stage does not resume from it"

    def _local_checkpoints(self) -> Iterator[tuple[str, Callable[[], bool]]]:
        for listed in sorted(self.store.resume_root.glob("*/[0-9]*.json")):
            point = listed.with_suffix("")
            yield f"resume/{point.parent.name}/{point.name}", partial(is_valid_checkpoint, point)

    def _remote_checkpoints(self) -> Iterator[tuple[str, Callable[[], bool]]]:
        if self.store.backend.folder is not None:
            return
        for path in self.store.documents("resume/"):
            if path.count("/") == 2 and path.endswith(".json"):
                yield path.removesuffix(".json"), partial(self._is_valid_remote, path)

    def _is_valid_remote(self, path: str) -> bool:
        point = self.store.resume_root.parent / path.removesuffix(".json")
        try:
            files = parse_checkpoint_manifest(point, self.store.backend.get(path) or b"").files
            return all(self.store.backend.entry(f"{path[:-5]}/{name}") == entry for name, entry in files.items())
        except (ValueError, FileNotFoundError, CorruptArtifact):
            return False

    def _working_copies(self) -> None:
        """Check that each working copy on this machine has the files of its artifact."""
        for copy in children(self.store.local / "artifacts"):
            manifest = self.manifests.get(copy.name)
            if self.contents and manifest is not None and not self.store.is_valid_copy(copy, manifest):
                self.damage.setdefault(
                    copy.name, f"the working copy {copy} was changed; it is downloaded again when it is used"
                )
