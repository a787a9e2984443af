"""Garbage collection: removes artifacts, blobs and checkpoints that no record references."""

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
"""Age below which unreferenced objects are not removed: a run may be about to reference them, s."""
WAIT_S = 60.0
"""Time to wait for writers to finish, s."""
PARTIAL_S = 60.0
"""Age from which a partly written file has no writer any more: a live writer extends it all the time, s."""
DIGEST = re.compile(rb"[0-9a-f]{64}")

Item = TypeVar("Item")
Found = TypeVar("Found")


def collect_garbage(
    store: Store, *, dry_run: bool = False, grace_s: float = GRACE_S, wait_s: float = WAIT_S
) -> dict[str, int]:
    """Remove what no finished stage and no run references: artifacts, blobs, working copies, checkpoints, scratch.

    Artifacts in a stage record or a run record stay, and so do the checkpoints of unfinished stages and everything
    younger than the grace period. Writers are excluded meanwhile (`gc_lock.py`). Ages are by the store's clock.

    Args:
        store: the store to collect.
        dry_run: only count what would be removed.
        grace_s: age below which nothing is removed, s.
        wait_s: how long to wait for writers, s.

    Returns:
        Number of removed `artifacts`, `blobs`, their `bytes`, working `copies`, abandoned `scratch` folders, and
        finished stages whose `resume` checkpoints were removed.

    Raises:
        CorruptArtifact: a referenced manifest cannot be read, so that its blobs are unknown.
        StoreError: a writer was active all the time.
    """
    with collecting(store.backend, wait_s) as marker:
        now = marker.now
        live = _referenced_digests(store)
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
        partial_checkpoints = [path for path in store.resume_root.glob("*/.*") if _age(path) > grace_s]
        finished = [key for key in _inactive_keys(store, now, grace_s) if store.stage_record(key) is not None]
        if not dry_run:
            signatures = [path for path in store.documents("signatures/") if manifest_path(path.split("/")[1]) in gone]
            for path in (*signatures, *(found.path for found in (*dead, *blobs))):
                marker.require_valid()
                store.backend.delete(path)
            for left in (*copies, *partial_checkpoints):
                marker.require_valid()
                remove(left)
            for key in finished:
                marker.require_valid()
                store.drop_resume(key)
            store.backend.discard_partial(max(grace_s, PARTIAL_S))
    return {
        "artifacts": len(dead),
        "blobs": len(blobs),
        "bytes": sum(found.size for found in blobs),
        "copies": len(copies),
        "scratch": scratch + len(partial_checkpoints),
        "resume": len(finished),
    }


def _referenced_digests(store: Store) -> set[str]:
    """Digests of artifacts that a finished stage wrote or read, or that are sources of a run.

    Every text that looks like a digest counts, so that damaged records and those of other versions protect their
    artifacts too.
    """
    records = [found.path for found in store.backend.list("stages/")]
    records += [path for path in store.documents("runs/") if path.endswith("/run.json")]
    return {
        digest.decode()
        for data in map_concurrently(store.backend.get, records)
        for digest in DIGEST.findall(data or b"")
    }


def _inactive_keys(store: Store, now: float, grace_s: float) -> list[str]:
    """Keys whose checkpoints are all older than the grace period, so that no stage is writing them."""
    youngest: dict[str, float] = {}
    for found in store.backend.list("resume/"):
        key = found.path.split("/")[1]
        youngest[key] = min(now - found.modified, youngest.get(key, now - found.modified))
    return sorted(key for key, age in youngest.items() if age > grace_s)


def children(folder: Path) -> list[Path]:
    """Sorted entries of a local folder; empty where there is no folder."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _age(path: Path) -> float:
    """Seconds since the last change to a local folder or to anything in it."""
    times = [each.lstat().st_mtime for each in (path, *path.rglob("*")) if each.is_symlink() or each.exists()]
    return time.time() - max(times, default=0.0)


def map_concurrently(do: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """Results of a function for several items, computed concurrently, in order."""
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        return list(pool.map(do, items))
