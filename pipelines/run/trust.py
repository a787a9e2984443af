"""What a recipe demands to be signed: its parent and its data before a run begins, its model before it is served."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.core.store.store import Store
from pipelines.recipe.schema import Recipe, Trust


def demand_sources(store: Store, recipe: Recipe, sources: Mapping[str, str]) -> None:
    """Refuse a parent or data that is not signed, where the recipe demands it.

    Raises:
        UntrustedArtifact: names the artifact, and how it is signed.
    """
    for name, digest in sources.items():
        part = "parent" if name == "parent" else "data"
        if recipe.trust is not None and part in recipe.trust.require:
            _demand(store, digest, recipe.trust.keys, name)


def demand_served(store: Store, digest: str, record: Mapping[str, Any], keys: Sequence[Path]) -> None:
    """Refuse to serve a model that is not signed, where its recipe or whoever serves it demands it.

    Args:
        store: where it is.
        digest: of the model.
        record: of its run.
        keys: trusted keys of whoever serves it, which count in place of the recipe's.

    Raises:
        UntrustedArtifact: names the artifact, and how it is signed.
    """
    written = record["recipe"].get("trust")
    trust = Trust.parse(written, where="trust") if written else None
    if keys:
        _demand(store, digest, keys, "model")
    elif trust is not None and "deploy" in trust.require:
        _demand(store, digest, trust.keys, "model")


def _demand(store: Store, digest: str, keys: Sequence[Path], what: str) -> None:
    from components.core.store.signatures import demand_signature

    demand_signature(store, digest, keys, what)
