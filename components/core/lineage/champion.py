"""The champion of a registered model: the bundle that serves all traffic.

    champions/<name>.json     digest of the bundle

The store has the word; MLflow's alias `champion` follows it, at once or with the next delivery of the run.
"""

from typing import TYPE_CHECKING
from urllib.parse import quote

from components.core.lineage.pipeline_runs import TAG
from components.core.lineage.tracking import lineage_lock, tracking
from components.core.store.store import Store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

ALIAS = "champion"


def champion(store: Store, name: str) -> str | None:
    """Digest of the champion of a registered model, None without one."""
    found = store.read_document_or_none(_path(name))
    return None if found is None else str(found["digest"])


def move_champion(store: Store, name: str, digest: str, tracking_uri: str | None) -> None:
    """Make a bundle the champion. Call it once the bundle serves all traffic; to call it again has no effect.

    Where MLflow does not have the bundle yet, its alias moves when the run of the bundle is delivered.

    Args:
        store: has the bundle.
        name: of the registered model.
        digest: of the bundle.
        tracking_uri: address of MLflow; None where nothing is delivered from here.

    Raises:
        LineageError: MLflow does not answer, or refuses; the store has the new champion.
    """
    if champion(store, name) != digest:
        store.put_document(_path(name), {"digest": digest})
    if tracking_uri is not None:
        with lineage_lock(store), tracking(tracking_uri) as client:
            for version in bundle_versions(client, name, digest)[:1]:
                client.set_registered_model_alias(name, ALIAS, version.version)


def bundle_versions(client: "MlflowClient", name: str, digest: str) -> list["ModelVersion"]:
    """Versions of a registered model for a bundle."""
    found = client.search_model_versions(f"name = '{name}'")
    return [version for version in found if version.tags.get(f"{TAG}digest") == digest]


def _path(name: str) -> str:
    return f"champions/{quote(name, safe='')}.json"
