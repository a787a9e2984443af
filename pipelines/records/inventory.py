"""What is in a store: each artifact with its size, the stages that made it, and its roles in runs."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from components.core.base.errors import CorruptArtifact, StoreError
from components.core.store.store import Store
from pipelines.records.runs import artifacts, run_records


def list_artifacts(store: Store) -> list[dict[str, Any]]:
    """Every artifact: `digest`, `kind` (None: damaged), number of `files`, `bytes`, `made_by` and `roles`."""
    makers, roles = _makers(store), _roles(store)
    return [
        {
            "digest": digest,
            **_contents(store, digest),
            "made_by": makers.get(digest, []),
            "roles": sorted(roles.get(digest, ())),
        }
        for digest in (Path(path).stem for path in store.documents("artifacts/"))
    ]


def _contents(store: Store, digest: str) -> dict[str, Any]:
    try:
        manifest = store.manifest(digest)
    except (CorruptArtifact, StoreError):
        return {"kind": None, "files": None, "bytes": None}
    return {"kind": manifest.kind, "files": len(manifest.files), "bytes": manifest.size}


def _makers(store: Store) -> dict[str, list[dict[str, str]]]:
    """Stages by the digest of what they made."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for record in store.stage_records():
        for output, digest in record.outputs.items():
            found[digest].append({"stage": record.stage, "output": output, "key": record.key})
    return found


def _roles(store: Store) -> dict[str, set[str]]:
    """`RUN/ROLE` by digest."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in run_records(store):
        for role, digest in (artifacts(store, record["run"]) | record["sources"]).items():
            found[digest].add(f"{record['run']}/{role}")
    return found
