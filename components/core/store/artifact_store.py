"""Artifacts by digest: stored once, downloaded to this machine with every byte verified.

    blobs/sha256/ab/abc…      file contents, immutable        artifacts/<digest>.json   manifests
    <local>/artifacts/<digest>/…                              working copies, read-only

Blobs are written before the manifest that names them, so every blob that a reader finds in a manifest exists.
"""

import contextlib
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import JsonValue, ValidationError

from components.core.base.config import canonical_json
from components.core.base.errors import CorruptArtifact, StoreError
from components.core.base.fault_injection import fault_point
from components.core.store.folder_store import explain_write_errors
from components.core.store.gc_lock import writing
from components.core.store.manifest import FileEntry, Kind, Manifest, hash_chunks, hash_file, read_source, stamp_of
from components.core.store.object_store import ObjectInfo, ObjectStore

PARALLEL_FILES = 4
"""Files that are copied or read at the same time."""
SMALL_BYTES, MAX_SMALL = 64 << 10, 256
"""Largest contents that are cached in memory after they were read, and their number: at most 16 MiB."""
REPAIR_HINT = (
    "run the recipe again: stages whose results are damaged are computed anew; `tessera store verify` lists all damage"
)


class ArtifactStore:
    """Artifacts of one store; `local` is the folder of working copies on this machine."""

    def __init__(self, uri: str, backend: ObjectStore, local: Path) -> None:
        self.uri = uri
        self.local = local
        self.backend = backend
        self._verified: set[tuple[str, Hashable]] = set()
        """Digest and stamp of contents that this process has verified and does not read again."""
        self._small_contents: dict[str, bytes] = {}
        """Small contents that this process has read, by digest."""
        self._damaged_blobs: set[str] = set()
        """Digests of blobs that this process found damaged; they are stored again even if their metadata is right."""
        self._writers_lock, self._num_writers, self._marker = threading.Lock(), 0, contextlib.ExitStack()

    def put_folder(self, folder: Path, kind: Kind, metadata: Mapping[str, JsonValue] | None = None) -> Manifest:
        """Store the files below a folder as an artifact; contents that the store has are not sent again.

        Raises:
            StoreError: no space, or the store cannot be reached; the artifact is then absent.
        """
        with self.writing():
            return self._put_folder(folder, kind, metadata or {})

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Exclude garbage collection while stored artifacts have no reference yet. Reentrant."""
        with self._writers_lock:
            if self._num_writers == 0:
                self._marker.enter_context(writing(self.backend))
            self._num_writers += 1
        try:
            yield
        finally:
            with self._writers_lock:
                self._num_writers -= 1
                if self._num_writers == 0:
                    self._marker.close()

    def _put_folder(self, folder: Path, kind: Kind, metadata: Mapping[str, JsonValue]) -> Manifest:
        """Store the blobs, then the manifest that names them."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            entries = list(pool.map(self._put_blob, paths))
        files = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
        try:
            manifest = Manifest(kind=kind, files=files, metadata=dict(metadata))
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise StoreError(f"the files of {folder} cannot be an artifact: {reason}") from None
        fault_point("artifact.blobs")
        self.backend.put(manifest_path(manifest.digest), canonical_json(manifest.canonical()).encode())
        fault_point("artifact.named")
        return manifest

    def manifest(self, digest: str) -> Manifest:
        """The manifest of an artifact.

        Raises:
            StoreError: there is no such artifact.
            CorruptArtifact: the manifest is not the one that the digest names.
        """
        try:
            data = self.backend.get(manifest_path(digest)) if re.fullmatch("[0-9a-f]{64}", digest) else None
            manifest = None if data is None else Manifest.model_validate_json(data)
            found = digest if manifest is None else manifest.digest
        except (ValueError, CorruptArtifact):
            raise CorruptArtifact(f"the manifest of artifact {digest[:12]} cannot be read", hint=REPAIR_HINT) from None
        if manifest is None:
            raise StoreError(f"there is no artifact {digest[:12]} in {self.uri}", hint="check --store")
        if found != digest:
            raise CorruptArtifact(
                f"the manifest of artifact {digest[:12]} was changed: {digest} expected, {found} found",
                hint=REPAIR_HINT,
            )
        return manifest

    def fetch(self, digest: str) -> Path:
        """The files of an artifact in a local, read-only folder, every byte verified.

        Raises:
            StoreError: there is no such artifact, or no space for it.
            CorruptArtifact: contents differ from their digest.
        """
        manifest, target = self.manifest(digest), self.local / "artifacts" / digest
        if not self.is_valid_copy(target, manifest):
            with explain_write_errors(manifest.size, self.local):
                self._fill_copy(digest, manifest, target)
        os.utime(target)  # in use: garbage collection must not remove it
        return target

    def read(self, digest: str, name: str) -> bytes:
        """One small file of an artifact, verified, without downloading the others.

        Raises:
            StoreError: there is no such artifact or file.
            CorruptArtifact: the contents differ from their digest.
        """
        entry = self.manifest(digest).files.get(name)
        data = (
            None
            if entry is None
            else self._small_contents.get(entry.sha256) or self.backend.get(blob_path(entry.sha256))
        )
        if entry is None or data is None:
            raise self._missing_file(digest, name)
        self._require_equal(digest, name, entry, hash_chunks([data]))
        return data

    def verify(self, digest: str) -> Manifest:
        """Read every byte of an artifact in the store; returns its manifest.

        Raises:
            StoreError: the artifact or one of its files is missing.
            CorruptArtifact: a file differs in size or digest.
        """
        manifest = self.manifest(digest)
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(lambda item: self._verify_blob(digest, *item), manifest.files.items()))
        return manifest

    def _put_blob(self, path: Path) -> FileEntry:
        """Store one file under its digest."""
        source = read_source(path)
        entry = source.entry
        if entry.sha256 in self._damaged_blobs:
            self.backend.delete(blob_path(entry.sha256))
            self._damaged_blobs.discard(entry.sha256)
        self.backend.put_file(blob_path(entry.sha256), source)
        found = self.backend.stat(blob_path(entry.sha256)) if self.backend.folder is not None else None
        if found is not None:  # an upload is not downloaded again to verify it
            self._verified.add((entry.sha256, found.stamp))
        return entry

    def _verify_blob(self, digest: str, name: str, entry: FileEntry) -> None:
        """Verify one file in the store, unless this process has."""
        found = self.backend.stat(blob_path(entry.sha256))
        if found is None:
            raise self._missing_file(digest, name)
        if found.size != entry.size or not self.is_valid_blob(entry.sha256, found):
            self._require_equal(digest, name, entry, self._entry(found))

    def is_valid_blob(self, sha256: str, found: ObjectInfo) -> bool:
        """Whether the bytes of a blob have the digest in its name. Each blob is read once per process."""
        if (sha256, found.stamp) not in self._verified:
            entry = self._entry(found)
            if entry is None or entry.sha256 != sha256:
                return False
            self._verified.add((sha256, found.stamp))
        return True

    def is_valid_copy(self, folder: Path, manifest: Manifest) -> bool:
        """Whether a working copy has the files of the manifest with the right bytes, and no other files."""
        if folder.is_symlink() or not folder.is_dir():
            return False
        names = {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()
        }
        if names != set(manifest.files):
            return False
        try:
            return all(self._is_valid_file(folder / name, entry) for name, entry in manifest.files.items())
        except FileNotFoundError:  # another process is replacing it
            return False

    def _is_valid_file(self, path: Path, entry: FileEntry) -> bool:
        """Whether a local file is a regular file with the right bytes."""
        status = path.lstat()
        stamp = stamp_of(status)
        if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
            return False
        if (entry.sha256, stamp) not in self._verified:
            if hash_file(path) != entry:
                return False
            self._verified.add((entry.sha256, stamp))
        return True

    def _fill_copy(self, digest: str, manifest: Manifest, target: Path) -> None:
        """Download all files into a temporary folder, verify them, then rename it to the target."""
        fresh = target.with_name(f"{digest}.{uuid.uuid4().hex}.partial")
        try:
            fresh.mkdir(parents=True)
            fault_point("copy.begun")
            with ThreadPoolExecutor(PARALLEL_FILES) as pool:
                list(pool.map(lambda item: self._fetch_file(digest, fresh, *item), manifest.files.items()))
            fault_point("copy.filled")
            self._place_copy(fresh, target, manifest)
            fault_point("copy.named")
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _place_copy(self, fresh: Path, target: Path, manifest: Manifest) -> None:
        """Rename a complete folder to the target, unless another process did first; a damaged target is replaced."""
        try:
            fresh.rename(target)
        except OSError:
            if not self.is_valid_copy(target, manifest):
                with contextlib.suppress(OSError):  # a link or a file instead of a folder
                    target.unlink()
                shutil.rmtree(target, ignore_errors=True)
                fresh.rename(target)

    def _fetch_file(self, digest: str, folder: Path, name: str, entry: FileEntry) -> None:
        """Download one file into a folder and verify it."""
        target = folder / name
        try:
            found = self.backend.get_file(blob_path(entry.sha256), target)
        except FileNotFoundError:
            raise self._missing_file(digest, name) from None
        except CorruptArtifact:
            self._require_equal(digest, name, entry, None)
            raise
        if found is not None or not self._is_valid_file(target, entry):
            self._require_equal(digest, name, entry, found or hash_file(target))
        target.chmod(0o444)
        self._verified.add((entry.sha256, stamp_of(target.stat())))

    def _entry(self, found: ObjectInfo) -> FileEntry | None:
        """Digest and size of a blob; None where it cannot be read. Small contents are cached for `read`."""
        with contextlib.suppress(CorruptArtifact):
            if found.size > SMALL_BYTES or len(self._small_contents) >= MAX_SMALL:
                return self.backend.entry(found.path)
            data = self.backend.get(found.path) or b""
            entry = hash_chunks([data])
            self._small_contents[entry.sha256] = data
            return entry
        return None

    def _require_equal(self, digest: str, name: str, expected: FileEntry, found: FileEntry | None) -> None:
        """Raise CorruptArtifact unless contents have the digest and size in the manifest."""
        if found == expected:
            return
        self._damaged_blobs.add(expected.sha256)
        now = "cannot be read" if found is None else f"{found.sha256} of {found.size:,} bytes found"
        raise CorruptArtifact(
            f"file {name} of artifact {digest[:12]} was changed: sha256 {expected.sha256} of {expected.size:,} bytes "
            f"expected, {now}",
            hint=REPAIR_HINT,
        )

    def _missing_file(self, digest: str, name: str) -> StoreError:
        return StoreError(f"file {name} of artifact {digest[:12]} is missing in {self.uri}", hint=REPAIR_HINT)


def blob_path(sha256: str) -> str:
    """Path of the object with these contents."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def manifest_path(digest: str) -> str:
    """Path of the object with the manifest of an artifact."""
    return f"artifacts/{digest}.json"
