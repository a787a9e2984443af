"""Removes what nothing in a store refers to."""

import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from components.core.base.scratch_dir import sweep
from components.core.store.artifact_store import PARALLEL_FILES, manifest_path
from components.core.store.folder_store import remove
from components.core.store.gc_lock import collecting
from components.core.store.store import Store

GRACE_S = 3600.0
"""Age below which unreferenced objects are left alone: a run may be about to name them, s."""
WAIT_S = 60.0
"""How long a clean-up waits for writers to finish, s."""
PARTIAL_S = 60.0
"""Age from which a half-written file counts as left behind: it grows as long as its writer lives, s."""
DIGEST = re.compile(rb"[0-9a-f]{64}")

Item = TypeVar("Item")
Found = TypeVar("Found")


def collect_garbage(
    store: Store, *, dry_run: bool = False, grace_s: float = GRACE_S, wait_s: float = WAIT_S
) -> dict[str, int]:
    """Remove what no finished stage and no run refers to: artifacts, blobs, working copies, resume points, scratch.

    Whatever a stage record or a run record names stays, and so do the resume points of stages that have not finished.
    What is younger than the grace stays too, and no writer is at work meanwhile (`gc_lock.py`), so that nothing is
    taken from under one. Ages are told by the store's clock.

    Args:
        store: what to clean.
        dry_run: only tell what would go.
        grace_s: age below which nothing is removed, s.
        wait_s: how long to wait for writers, s.

    Returns:
        How many `artifacts`, `blobs`, their `bytes`, working `copies`, left-behind `scratch`, and `resume` points of
        finished stages were removed, or would be.

    Raises:
        CorruptArtifact: a manifest that is referred to cannot be read, so that its blobs are unknown.
        StoreError: a writer was at work all the time.
    """
    with collecting(store.backend, wait_s) as marker:
        now = marker.now
        live = _referred_to(store)
        manifests = list(store.backend.list("artifacts/"))
        dead = [found for found in manifests if Path(found.path).stem not in live and now - found.modified > grace_s]
        gone = {found.path for found in dead}
        kept = {Path(found.path).stem for found in manifests if found.path not in gone}
        needed = {
            entry.sha256 for manifest in map_concurrently(store.manifest, kept) for entry in manifest.files.values()
        }
        blobs = [
            found
            for found in store.backend.list("blobs/")
            if Path(found.path).name not in needed and now - found.modified > grace_s
        ]
        copies = [
            path for path in children(store.local / "artifacts") if path.name not in kept and _age(path) > grace_s
        ]
        scratch = sweep(store.local / "tmp", dry_run=dry_run)
        half_saved = [path for path in store.resume_root.glob("*/.*") if _age(path) > grace_s]
        finished = [key for key in _resting_keys(store, now, grace_s) if store.stage_record(key) is not None]
        if not dry_run:
            signatures = [path for path in store.documents("signatures/") if manifest_path(path.split("/")[1]) in gone]
            for path in (*signatures, *(found.path for found in (*dead, *blobs))):
                store.backend.delete(path)
                marker.keep()
            for left in (*copies, *half_saved):
                remove(left)
            for key in finished:
                store.drop_resume(key)
            store.backend.discard_partial(max(grace_s, PARTIAL_S))
    return {
        "artifacts": len(dead),
        "blobs": len(blobs),
        "bytes": sum(found.size for found in blobs),
        "copies": len(copies),
        "scratch": scratch + len(half_saved),
        "resume": len(finished),
    }


def _referred_to(store: Store) -> set[str]:
    """Artifacts that a finished stage made or read, or that a run was started from.

    Whatever looks like a digest counts, so that records of another version, and damaged ones, keep what they name.
    """
    records = [found.path for found in store.backend.list("stages/")]
    records += [path for path in store.documents("runs/") if path.endswith("/run.json")]
    return {
        digest.decode()
        for data in map_concurrently(store.backend.get, records)
        for digest in DIGEST.findall(data or b"")
    }


def _resting_keys(store: Store, now: float, grace_s: float) -> list[str]:
    """Keys whose resume points are all old: none is being computed."""
    youngest: dict[str, float] = {}
    for found in store.backend.list("resume/"):
        key = found.path.split("/")[1]
        youngest[key] = min(now - found.modified, youngest.get(key, now - found.modified))
    return sorted(key for key, age in youngest.items() if age > grace_s)


def children(folder: Path) -> list[Path]:
    """What a local folder holds, in order; nothing where it is not there."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _age(path: Path) -> float:
    """Seconds since anything in a local folder was written."""
    times = [each.lstat().st_mtime for each in (path, *path.rglob("*")) if each.is_symlink() or each.exists()]
    return time.time() - max(times, default=0.0)


def map_concurrently(do: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """Ask of several at a time, in order."""
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        return list(pool.map(do, items))
