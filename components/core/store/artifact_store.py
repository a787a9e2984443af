"""Artifacts by digest: stored once, brought to this machine verified.

    blobs/sha256/ab/abc…      file contents, immutable        artifacts/<digest>.json   manifests
    <local>/artifacts/<digest>/…                              working copies, read-only

Blobs are written before the manifest that names them, so whatever a reader finds named is there.
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
"""Files moved, or read through, at a time."""
SMALL_BYTES, MAX_SMALL = 64 << 10, 256
"""Largest contents that stay in memory after they were read, and how many of them: at most 16 MiB."""
REPAIR_HINT = (
    "run the recipe again: stages whose results are damaged are computed anew; `tessera store verify` lists all damage"
)


class ArtifactStore:
    """Artifacts behind one address; `local` keeps working copies on this machine."""

    def __init__(self, uri: str, backend: ObjectStore, local: Path) -> None:
        self.uri = uri
        self.local = local
        self.backend = backend
        self._whole: set[tuple[str, Hashable]] = set()
        """Digest and stamp of contents that this process has verified; they are not read again."""
        self._small: dict[str, bytes] = {}
        """Small contents by digest, that this process has read."""
        self._damaged: set[str] = set()
        """Digests of blobs that this process has found damaged, whatever the server says of them."""
        self._entering, self._inside, self._announcement = threading.Lock(), 0, contextlib.ExitStack()

    def put_folder(self, folder: Path, kind: Kind, metadata: Mapping[str, JsonValue] | None = None) -> Manifest:
        """Store the files below a folder as an artifact; contents that are there already are not sent again.

        Raises:
            StoreError: no space, or the store cannot be reached; the artifact is then absent.
        """
        with self.writing():
            return self._put_folder(folder, kind, metadata or {})

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keep clean-ups away while what is stored is not referred to yet; may be entered again inside."""
        with self._entering:
            if self._inside == 0:
                self._announcement.enter_context(writing(self.backend))
            self._inside += 1
        try:
            yield
        finally:
            with self._entering:
                self._inside -= 1
                if self._inside == 0:
                    self._announcement.close()

    def _put_folder(self, folder: Path, kind: Kind, metadata: Mapping[str, JsonValue]) -> Manifest:
        """Blobs, then the manifest that names them."""
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
        if not self.is_whole_copy(target, manifest):
            with explain_write_errors(manifest.size, self.local):
                self._bring(digest, manifest, target)
        os.utime(target)  # in use: not for the clean-up
        return target

    def read(self, digest: str, name: str) -> bytes:
        """One small file of an artifact, verified, without bringing the others along.

        Raises:
            StoreError: there is no such artifact or file.
            CorruptArtifact: the contents differ from their digest.
        """
        entry = self.manifest(digest).files.get(name)
        data = None if entry is None else self._small.get(entry.sha256) or self.backend.get(blob_path(entry.sha256))
        if entry is None or data is None:
            raise self._missing(digest, name)
        self._compare(digest, name, entry, hash_chunks([data]))
        return data

    def verify(self, digest: str) -> Manifest:
        """Read every byte of an artifact in the store; returns its manifest.

        Raises:
            StoreError: the artifact or one of its files is not there.
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
        if entry.sha256 in self._damaged:
            self.backend.delete(blob_path(entry.sha256))
            self._damaged.discard(entry.sha256)
        self.backend.put_file(blob_path(entry.sha256), source)
        found = self.backend.stat(blob_path(entry.sha256)) if self.backend.folder is not None else None
        if found is not None:  # a server is not asked to read back what it has
            self._whole.add((entry.sha256, found.stamp))
        return entry

    def _verify_blob(self, digest: str, name: str, entry: FileEntry) -> None:
        """Read one file in the store, unless this process has."""
        found = self.backend.stat(blob_path(entry.sha256))
        if found is None:
            raise self._missing(digest, name)
        if found.size != entry.size or not self.is_whole_blob(entry.sha256, found):
            self._compare(digest, name, entry, self._entry(found))

    def is_whole_blob(self, sha256: str, found: ObjectInfo) -> bool:
        """Whether a blob has the digest that it is named by; read once a process."""
        if (sha256, found.stamp) not in self._whole:
            entry = self._entry(found)
            if entry is None or entry.sha256 != sha256:
                return False
            self._whole.add((sha256, found.stamp))
        return True

    def is_whole_copy(self, folder: Path, manifest: Manifest) -> bool:
        """Whether a working copy holds the files of the manifest, and no others."""
        if folder.is_symlink() or not folder.is_dir():
            return False
        names = {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()
        }
        if names != set(manifest.files):
            return False
        try:
            return all(self._same(folder / name, entry) for name, entry in manifest.files.items())
        except FileNotFoundError:  # another process is replacing it
            return False

    def _same(self, path: Path, entry: FileEntry) -> bool:
        """Whether a local file has the right bytes."""
        status = path.lstat()
        stamp = stamp_of(status)
        if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
            return False
        if (entry.sha256, stamp) not in self._whole:
            if hash_file(path) != entry:
                return False
            self._whole.add((entry.sha256, stamp))
        return True

    def _bring(self, digest: str, manifest: Manifest, target: Path) -> None:
        """Fill a folder beside the target, verified, then rename it."""
        fresh = target.with_name(f"{digest}.{uuid.uuid4().hex}.partial")
        try:
            fresh.mkdir(parents=True)
            fault_point("copy.begun")
            with ThreadPoolExecutor(PARALLEL_FILES) as pool:
                list(pool.map(lambda item: self._bring_file(digest, fresh, *item), manifest.files.items()))
            fault_point("copy.filled")
            self._settle(fresh, target, manifest)
            fault_point("copy.named")
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _settle(self, fresh: Path, target: Path, manifest: Manifest) -> None:
        """Give a whole folder its name, unless another process was first; what is there and damaged goes."""
        try:
            fresh.rename(target)
        except OSError:
            if not self.is_whole_copy(target, manifest):
                with contextlib.suppress(OSError):  # a link or a file that a stranger put there
                    target.unlink()
                shutil.rmtree(target, ignore_errors=True)
                fresh.rename(target)

    def _bring_file(self, digest: str, folder: Path, name: str, entry: FileEntry) -> None:
        """Bring one file into a folder, verified."""
        target = folder / name
        try:
            found = self.backend.get_file(blob_path(entry.sha256), target)
        except FileNotFoundError:
            raise self._missing(digest, name) from None
        except CorruptArtifact:
            self._compare(digest, name, entry, None)
            raise
        if found is not None or not self._same(target, entry):
            self._compare(digest, name, entry, found or hash_file(target))
        target.chmod(0o444)
        self._whole.add((entry.sha256, stamp_of(target.stat())))

    def _entry(self, found: ObjectInfo) -> FileEntry | None:
        """Digest and size of a blob; None where it cannot be read. Small contents stay in memory, for `read`."""
        with contextlib.suppress(CorruptArtifact):
            if found.size > SMALL_BYTES or len(self._small) >= MAX_SMALL:
                return self.backend.entry(found.path)
            data = self.backend.get(found.path) or b""
            entry = hash_chunks([data])
            self._small[entry.sha256] = data
            return entry
        return None

    def _compare(self, digest: str, name: str, expected: FileEntry, found: FileEntry | None) -> None:
        """Refuse contents that are not what the manifest names."""
        if found == expected:
            return
        self._damaged.add(expected.sha256)
        now = "cannot be read" if found is None else f"{found.sha256} of {found.size:,} bytes found"
        raise CorruptArtifact(
            f"file {name} of artifact {digest[:12]} was changed: sha256 {expected.sha256} of {expected.size:,} bytes "
            f"expected, {now}",
            hint=REPAIR_HINT,
        )

    def _missing(self, digest: str, name: str) -> StoreError:
        return StoreError(f"file {name} of artifact {digest[:12]} is missing in {self.uri}", hint=REPAIR_HINT)


def blob_path(sha256: str) -> str:
    """Where contents lie."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def manifest_path(digest: str) -> str:
    """Where a manifest lies."""
    return f"artifacts/{digest}.json"
