"""Delivers the records of runs from the store to MLflow, which may be away, slow, or restarted meanwhile.

The store is the outbox: a run writes its records there while it works, and a receipt once MLflow has all of them. A
delivery that broke off is repeated: what MLflow has already is found by its tags.
"""

import time
from collections.abc import Mapping
from typing import Any

from components.core.base.errors import CorruptArtifact
from components.core.lineage.curves import record_curves
from components.core.lineage.mlflow_run import Pipeline
from components.core.lineage.tracking import (
    LineageError,
    MlflowUnavailable,
    database_path,
    is_server,
    lineage_lock,
    tracking,
    without_password,
)
from components.core.store.store import Store

ENDED = ("succeeded", "failed", "interrupted", "killed")
PATIENCE_S = 60.0
"""Longest wait for a server that went away during a delivery."""
PAUSE_S = 1.0
MAX_RUNS_IN_ERROR = 3


def deliver(store: Store, run: str, tracking_uri: str, *, until: float = float("inf")) -> None:
    """Deliver a run to MLflow: its stages, curves, data, models and deployment, as far as MLflow lacks them.

    Args:
        store: where the run left its records, curves and `summary.json`.
        run: name of the run, ended or not.
        tracking_uri: an MLflow server, or `sqlite:///PATH`.
        until: monotonic time, s, after which no further stage is delivered.

    Raises:
        LineageError: MLflow cannot be reached, refuses, or takes too long; nothing is lost.
    """
    record = store.document(f"runs/{run}/run.json")
    unavailable_since, begun = None, False
    while True:
        try:
            with tracking(tracking_uri) as client:
                begun = is_server(tracking_uri)
                pipeline = Pipeline(client, store, record, tracking_uri, until)
                pipeline.deliver()
                pipeline.remove_duplicates()
            break
        except MlflowUnavailable:
            now = time.monotonic()
            unavailable_since = unavailable_since or now
            if not begun or now - unavailable_since >= PATIENCE_S or now >= until:
                raise
            time.sleep(PAUSE_S)
    store.put_document(_receipt_path(run), _receipt(record, tracking_uri))


def sync_pending_runs(
    store: Store, tracking_uri: str, *, anew: bool = False, within_s: float = float("inf")
) -> list[str]:
    """Deliver the runs that have ended and were not delivered since, in the order in which they ended.

    A run that MLflow refuses, or whose artifacts are damaged, does not stop the others.

    Args:
        store: where the runs are.
        tracking_uri: an MLflow server, or `sqlite:///PATH`.
        anew: also deliver runs that were delivered before, to an MLflow that lost its records.
        within_s: deliver no further stage after this time, s; the next delivery continues.

    Returns:
        Names of the runs that were delivered.

    Raises:
        LineageError: MLflow cannot be reached, or refuses some of the runs.
    """
    delivered: list[str] = []
    refused: list[str] = []
    until = time.monotonic() + within_s
    with lineage_lock(store):
        paths = [path for path in store.documents("runs/") if path.endswith("/run.json")]
        records = [record for path in paths if (record := store.read_document_or_none(path)) is not None]
        forget_lost_database(store, tracking_uri)
        if anew:
            _remove_receipts(store, tracking_uri)
        pending = _pending(store, records, tracking_uri)
        # Other runs take from the store what running ones have finished, and then deliver its curves.
        for run in [*(record["run"] for record in records if record["status"] not in ENDED), *pending]:
            record_curves(store, run)
        for run in pending:
            try:
                deliver(store, run, tracking_uri, until=until)
            except MlflowUnavailable:
                raise
            except (LineageError, CorruptArtifact) as error:
                refused.append(f"run {run}: {error.message}")
            else:
                delivered.append(run)
    if refused:
        more = f"; and {len(refused) - MAX_RUNS_IN_ERROR} more" if len(refused) > MAX_RUNS_IN_ERROR else ""
        raise LineageError(
            "; ".join(refused[:MAX_RUNS_IN_ERROR]) + more, hint="`tessera store verify` lists what is damaged"
        )
    return delivered


def _pending(store: Store, records: list[dict[str, Any]], tracking_uri: str) -> list[str]:
    """Runs that have ended and have no receipt for that, in the order in which they ended."""
    return [
        record["run"]
        for record in sorted(records, key=lambda record: record["finished"] or 0.0)
        if record["status"] in ENDED and store.document(_receipt_path(record["run"])) != _receipt(record, tracking_uri)
    ]


def forget_lost_database(store: Store, tracking_uri: str) -> None:
    """Remove the receipts for a database that is gone, before a new one takes its place; call under `lineage_lock`."""
    path = database_path(tracking_uri)
    if path is not None and not path.exists():
        _remove_receipts(store, tracking_uri)


def _remove_receipts(store: Store, tracking_uri: str) -> None:
    for path in store.documents("runs/"):
        if path.endswith("/mlflow.json") and store.document(path)["tracking_uri"] == without_password(tracking_uri):
            store.backend.delete(path)


def _receipt(record: Mapping[str, Any], tracking_uri: str) -> dict[str, Any]:
    """Document that is stored once a run was delivered: where to, and the state of the run then."""
    return {"tracking_uri": without_password(tracking_uri), "finished": record["finished"], "status": record["status"]}


def _receipt_path(run: str) -> str:
    return f"runs/{run}/mlflow.json"
