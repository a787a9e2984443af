"""Checkpoints of running stages: which one is complete, and the copies in a remote store.

    resume/<key>/<step>/…       files of a checkpoint       resume/<key>/<step>.json       its manifest

A checkpoint is complete once its manifest exists: the digests of its files, with a checksum (`checksummed_json.py`).
"""

import contextlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from components.core.base.errors import CorruptArtifact
from components.core.base.fault_injection import fault_point
from components.core.store.artifact_store import PARALLEL_FILES, ArtifactStore
from components.core.store.checksummed_json import seal, unseal
from components.core.store.manifest import Manifest, SourceFile, describe


def checkpoint_manifest_path(checkpoint: Path) -> Path:
    """Path of the manifest of a local checkpoint."""
    return checkpoint.with_name(f"{checkpoint.name}.json")


def write_checkpoint_manifest(checkpoint: Path) -> None:
    """Hash the files of a local checkpoint and mark it as complete."""
    partial = checkpoint.with_name(f".{checkpoint.name}.list")
    partial.write_bytes(seal(_key_and_step(checkpoint), describe(checkpoint, "table").canonical()))
    partial.rename(checkpoint_manifest_path(checkpoint))


def parse_checkpoint_manifest(checkpoint: Path, data: bytes) -> Manifest:
    """The files of a checkpoint. Raises ValueError where its manifest is damaged, or is from another checkpoint."""
    return Manifest.model_validate(unseal(_key_and_step(checkpoint), data))


def is_valid_checkpoint(checkpoint: Path) -> bool:
    """Whether every byte of a local checkpoint equals what was saved."""
    try:
        manifest = parse_checkpoint_manifest(checkpoint, checkpoint_manifest_path(checkpoint).read_bytes())
        has_links = any(path.is_symlink() for path in (checkpoint, *checkpoint.rglob("*")))
        return not has_links and describe(checkpoint, "table") == manifest
    except (ValueError, OSError):
        return False


class CheckpointStore(ArtifactStore):
    """A store of artifacts that also copies checkpoints between this machine and a remote store."""

    @property
    def resume_root(self) -> Path:
        """Folder of all checkpoints on this machine."""
        return (self.backend.folder or self.local) / "resume"

    def resume_folder(self, key: str) -> Path:
        """The local folder of a key's checkpoints. The newest valid one of a remote store is downloaded there first."""
        folder = self.resume_root / key
        folder.mkdir(parents=True, exist_ok=True)
        if self._is_remote:
            self._pull_newest(key, folder)
        return folder

    def push_resume(self, key: str, checkpoint: Path) -> None:
        """Copy a complete local checkpoint to a remote store: files, then manifest. Then older ones are deleted."""
        if not self._is_remote:
            return
        data = checkpoint_manifest_path(checkpoint).read_bytes()
        fault_point("mirror.begun")
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            files = [
                (f"resume/{key}/{checkpoint.name}/{name}", SourceFile(checkpoint / name, entry))
                for name, entry in parse_checkpoint_manifest(checkpoint, data).files.items()
            ]
            list(pool.map(lambda file: self.backend.put_file(*file), files))
        fault_point("mirror.files")
        self.backend.put(f"resume/{key}/{checkpoint.name}.json", data)
        fault_point("mirror.list")
        self._delete_remote(key, before=checkpoint.name)
        fault_point("mirror.trimmed")

    def drop_resume(self, key: str) -> None:
        """Remove all checkpoints of a finished stage: manifests first, so that no checkpoint looks complete."""
        fault_point("resume.drop")
        for manifest in (self.resume_root / key).glob("*.json"):
            manifest.unlink(missing_ok=True)
        fault_point("resume.hidden")
        shutil.rmtree(self.resume_root / key, ignore_errors=True)
        fault_point("resume.dropped")
        if self._is_remote:
            self._delete_remote(key)

    @property
    def _is_remote(self) -> bool:
        return self.backend.folder is None

    def _delete_remote(self, key: str, before: str = "a") -> None:
        """Delete the remote checkpoints whose names sort before another: their manifests, then their files."""
        paths = [found.path for found in self.backend.list(f"resume/{key}/")]
        for path in sorted(paths, key=lambda path: path.count("/")):
            if path.split("/")[2].partition(".")[0] < before:
                self.backend.delete(path)

    def _pull_newest(self, key: str, folder: Path) -> None:
        """Download the newest valid checkpoint of a remote store; damaged ones are skipped."""
        paths = [found.path for found in self.backend.list(f"resume/{key}/")]
        manifests = [path for path in paths if path.count("/") == 2 and path.endswith(".json")]
        for path in sorted(manifests, reverse=True):
            checkpoint = folder / Path(path).stem
            with contextlib.suppress(ValueError, FileNotFoundError, CorruptArtifact):
                data = self.backend.get(path) or b""
                manifest, local = parse_checkpoint_manifest(checkpoint, data), checkpoint_manifest_path(checkpoint)
                if not is_valid_checkpoint(checkpoint) or local.read_bytes() != data:
                    self._pull(f"resume/{key}/{checkpoint.name}", manifest, checkpoint)
                    local.write_bytes(data)
                return

    def _pull(self, prefix: str, manifest: Manifest, checkpoint: Path) -> None:
        """Download one checkpoint. Raises ValueError for damaged bytes, FileNotFoundError for missing files."""
        partial = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            for name, entry in manifest.files.items():
                if self.backend.get_file(f"{prefix}/{name}", partial / name) != entry:
                    raise ValueError(name)
            fault_point("pull.filled")
            checkpoint_manifest_path(checkpoint).unlink(missing_ok=True)
            shutil.rmtree(checkpoint, ignore_errors=True)
            fault_point("pull.cleared")
            partial.rename(checkpoint)
            fault_point("pull.named")
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _key_and_step(checkpoint: Path) -> str:
    """Part of the checksum, so that checkpoints of two computations cannot be exchanged."""
    return f"{checkpoint.parent.name}/{checkpoint.name}"
