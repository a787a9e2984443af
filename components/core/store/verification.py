"""Looks for damage: every record, manifest and byte of a store is read again."""

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
"""Where sealed documents are."""
_NAMED = 3
"""Files named of a damaged artifact; the others are counted."""


def find_faults(
    store: Store, kinds: Mapping[str, Mapping[str, Kind]] | None = None, *, contents: bool = True
) -> dict[str, str]:
    """Check everything that is stored: blobs, manifests, stage records, records of runs, resume points, working copies.

    Args:
        store: what to check.
        kinds: kind of each output of each stage, to hold records against.
        contents: read every byte of blobs and resume points; otherwise only what names them, and sizes.

    Returns:
        Name to what is wrong with it: the digest of a blob or artifact, the key of a stage record, the path of anything
        else. Empty where all is well.
    """
    return _Inspection(store, kinds or {}, contents).faults()


@dataclass
class _Inspection:
    """One look at all of a store."""

    store: Store
    kinds: Mapping[str, Mapping[str, Kind]]
    contents: bool
    wrong: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each blob that is as its name says."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Artifacts that are stored and whole."""

    def faults(self) -> dict[str, str]:
        """What is wrong, by name."""
        self._blobs()
        self._artifacts()
        self._stage_records()
        self._documents()
        self._points()
        self._copies()
        return dict(sorted(self.wrong.items()))

    def _blobs(self) -> None:
        """Every blob is what its name says, whether a manifest names it or not."""
        found = list(self.store.backend.list("blobs/"))
        for blob, fault in zip(found, map_concurrently(self._blob_fault, found), strict=True):
            name = Path(blob.path).name
            if fault is not None:
                self.wrong[name] = fault
            else:
                self.sizes[name] = blob.size

    def _blob_fault(self, blob: ObjectInfo) -> str | None:
        name = Path(blob.path).name
        if blob.path != blob_path(name) or not DIGEST.fullmatch(name.encode()):
            return f"{blob.path} is no blob"
        if self.contents and not self.store.is_whole_blob(name, blob):
            return f"blob {name} was changed: its bytes have another digest, or cannot be read"
        return None

    def _artifacts(self) -> None:
        """Every manifest is what its name says, and its files are there."""
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
                more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
                named = ", ".join(faults[:_NAMED])
                self.wrong[digest] = f"artifact {digest}: changed or missing in {self.store.uri}: {named}{more}"

    def _manifest(self, digest: str) -> Manifest | None:
        try:
            return self.store.manifest(digest)
        except (CorruptArtifact, StoreError) as error:
            self.wrong[digest] = error.message
        return None

    def _stage_records(self) -> None:
        """Every record is sealed, is of the computation it is named after, and names artifacts of the right kind."""
        found = [Path(stored.path).stem for stored in self.store.backend.list("stages/")]
        for record in filter(None, map_concurrently(self._record, found)):
            self._present((*record.outputs.values(), *digests_by_name(record.inputs).values()))
            declared = self.kinds.get(record.stage)
            if declared is not None:
                self._of_right_kind(record, declared)

    def _of_right_kind(self, record: StageRecord, declared: Mapping[str, Kind]) -> None:
        """A stage's outputs are of the kinds that it makes."""
        for name, digest in record.outputs.items():
            kind = self.manifests[digest].kind if digest in self.manifests else None
            if kind is not None and kind != declared.get(name):
                self.wrong[record.key] = (
                    f"the record of stage {record.key[:12]} has the {kind} {digest[:12]} as {name} of {record.stage}"
                )

    def _record(self, key: str) -> StageRecord | None:
        try:
            return self.store.checked_record(key)
        except CorruptArtifact as error:
            self.wrong[key] = error.message
        return None

    def _documents(self) -> None:
        """Every record of a run is sealed, and what a run was started from is there."""
        found = [path for prefix in DOCUMENTS for path in self.store.documents(prefix)]
        paths = [path for path in found if path.endswith(".json")]
        for path, document in zip(paths, map_concurrently(self._document, paths), strict=True):
            if path.endswith("/run.json") and document is not None:
                self._present(document.get("sources", {}).values())

    def _document(self, path: str) -> "Mapping[str, Mapping[str, str]] | None":
        try:
            found: Mapping[str, Mapping[str, str]] | None = self.store.document(path)
        except CorruptArtifact as error:
            self.wrong[path] = error.message
            return None
        return found

    def _present(self, digests: Iterable[str]) -> None:
        """Report artifacts that are referred to and do not exist."""
        for digest in digests:
            if digest not in self.manifests and digest not in self.wrong:
                self.wrong[digest] = f"there is no artifact {digest[:12]} in {self.store.uri}"

    def _points(self) -> None:
        """Every resume point with a list is as it was saved, here and in a remote store."""
        for name, is_point_whole in (*self._local_points(), *self._remote_points()):
            if self.contents and not is_point_whole():
                self.wrong[name] = f"{name} was changed; the stage does not go on from it"

    def _local_points(self) -> Iterator[tuple[str, Callable[[], bool]]]:
        for listed in sorted(self.store.resume_root.glob("*/[0-9]*.json")):
            point = listed.with_suffix("")
            yield f"resume/{point.parent.name}/{point.name}", partial(is_valid_checkpoint, point)

    def _remote_points(self) -> Iterator[tuple[str, Callable[[], bool]]]:
        if self.store.backend.folder is not None:
            return
        for path in self.store.documents("resume/"):
            if path.count("/") == 2 and path.endswith(".json"):
                yield path.removesuffix(".json"), partial(self._is_remote_whole, path)

    def _is_remote_whole(self, path: str) -> bool:
        point = self.store.resume_root.parent / path.removesuffix(".json")
        try:
            files = parse_checkpoint_manifest(point, self.store.backend.get(path) or b"").files
            return all(self.store.backend.entry(f"{path[:-5]}/{name}") == entry for name, entry in files.items())
        except (ValueError, FileNotFoundError, CorruptArtifact):
            return False

    def _copies(self) -> None:
        """Every working copy on this machine holds what its artifact holds."""
        for copy in children(self.store.local / "artifacts"):
            manifest = self.manifests.get(copy.name)
            if self.contents and manifest is not None and not self.store.is_whole_copy(copy, manifest):
                self.wrong.setdefault(copy.name, f"the working copy {copy} was changed; it is made anew when used")
