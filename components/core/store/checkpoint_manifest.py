"""The sealed list beside a resume point: its files with their digests. A point counts once its list is there.

resume/<key>/<step>/…     the point          resume/<key>/<step>.json     its list
"""

from pathlib import Path

from components.core.store.checksummed_json import seal, unseal
from components.core.store.manifest import Manifest, describe


def list_of(point: Path) -> Path:
    """Where the list of a point lies."""
    return point.with_name(f"{point.name}.json")


def write_list(point: Path) -> None:
    """Read a point through and make it count."""
    partial = point.with_name(f".{point.name}.list")
    partial.write_bytes(seal(_place(point), describe(point, "table").canonical()))
    partial.rename(list_of(point))


def read_list(point: Path, data: bytes) -> Manifest:
    """The files of a point. Raises ValueError where its list is damaged, or is another's."""
    return Manifest.model_validate(unseal(_place(point), data))


def is_whole(point: Path) -> bool:
    """Whether every byte of a local point is as it was saved."""
    try:
        listed = read_list(point, list_of(point).read_bytes())
        linked = any(path.is_symlink() for path in (point, *point.rglob("*")))
        return not linked and describe(point, "table") == listed
    except (ValueError, OSError):
        return False


def _place(point: Path) -> str:
    """Key and step, so that the points of two computations cannot be exchanged."""
    return f"{point.parent.name}/{point.name}"
