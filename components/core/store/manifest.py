"""What passes between stages: folders of files, known by the digest of their manifest."""

import hashlib
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, field_validator

from components.core.base.config import Config, digest_of

Kind = Literal["model", "tokenizer", "data", "library", "table"]
"""model: a Hugging Face folder with its tokenizer. tokenizer: tokenizer files and chat template. data: JSONL files.
library: trained block variants, safetensors. table: JSON files with numbers."""

HASH_CHUNK_BYTES = 1 << 20
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 1024
"""What file systems and S3 keep of a name, and of a path."""
_UNSAFE = re.compile(r"[\0\\]|^[A-Za-z]:")
"""What leaves the folder on some system: zero bytes, backslashes, drive letters."""


class FileEntry(Config):
    """One file of an artifact."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the contents, 64 hex digits."""
    size: int = Field(ge=0)
    """Bytes."""


class Manifest(Config):
    """An artifact: its kind, its files by relative POSIX path, and small facts about it."""

    kind: Kind
    """What the files are."""
    files: dict[str, FileEntry]
    """Relative POSIX path to content."""
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    """Small facts, part of the digest: nothing that differs between two equal results."""

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        """Names stay below the artifact's folder, wherever a manifest comes from."""
        folders = {name[:end] for name in files for end, letter in enumerate(name) if letter == "/"}
        for name in files:
            if (reason := _objection(name)) or name in folders:
                raise ValueError(f"{name[:80]!r} {reason or 'is a file and a folder'}")
        return files

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical manifest; the name of the artifact everywhere."""
        return digest_of(self.canonical())

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())


def _objection(name: str) -> str | None:
    """Why a relative path cannot name a file of an artifact; None where it can."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or _UNSAFE.search(name):
        return "leaves the folder"
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "is no UTF-8"
    return "is too long" if max(sizes) > MAX_NAME_BYTES or len(name.encode()) > MAX_PATH_BYTES else None


def hash_file(path: Path) -> FileEntry:
    """Digest and size of a file, read once with bounded memory."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            sha.update(chunk)
            size += len(chunk)
    return FileEntry(sha256=sha.hexdigest(), size=size)


def describe(folder: Path, kind: Kind, metadata: dict[str, JsonValue] | None = None) -> Manifest:
    """The manifest of the files below `folder`, without storing anything."""
    files = {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return Manifest(kind=kind, files=files, metadata=metadata or {})
