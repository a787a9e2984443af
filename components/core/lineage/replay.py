"""The way of records from the store to MLflow, which may be away, slow, or start anew in between.

The store is the outbox: what a run did is written there while it works, and a receipt once MLflow has it all. A
delivery that broke off, in whatever way, is simply repeated: what MLflow has already is found by its tags. MLflow's
client would repeat single requests by itself, and with them the making of a run whose answer was lost; that is off.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.core.base.errors import CorruptArtifact
from components.core.lineage.curves import record_curves
from components.core.lineage.mlflow_run import LineageError, MlflowAway, Pipeline
from components.core.store.store import Store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

ENDED = ("succeeded", "failed", "interrupted", "killed")
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
REQUEST_TIMEOUT_S = 20
"""How long an answer may take, unless the environment says `MLFLOW_HTTP_REQUEST_TIMEOUT`."""
PROBE_TIMEOUT_S = 5.0
PATIENCE_S = 60.0
"""How long a server that went away in the middle of a delivery is waited for."""
PAUSE_S = 1.0
MAX_TOLD = 3
"""Runs that are named in one error."""


def deliver(store: Store, run: str, tracking_uri: str, *, until: float = float("inf")) -> None:
    """Tell MLflow of a run: its stages, curves, data, models and deployment, whatever it does not know yet.

    Args:
        store: where the run left its records, curves and `summary.json`.
        run: name of the run, ended or not.
        tracking_uri: an MLflow server, or `sqlite:///PATH`.
        until: monotonic time, s, at which no further stage is begun.

    Raises:
        LineageError: MLflow cannot be reached, refuses, or takes too long; nothing is lost.
    """
    record = store.document(f"runs/{run}/run.json")
    away_since, begun = None, False
    for attempt in itertools.count():
        try:
            with _tracking(tracking_uri) as client:
                begun = _is_server(tracking_uri)
                pipeline = Pipeline(client, store, record, tracking_uri, until)
                pipeline.deliver()
                if attempt:
                    pipeline.remove_doubles()
            break
        except MlflowAway:
            now = time.monotonic()
            away_since = away_since or now
            if not begun or now - away_since >= PATIENCE_S or now >= until:
                raise
            time.sleep(PAUSE_S)
    store.put_document(_receipt_path(run), _receipt(record, tracking_uri))


def sync_pending_runs(
    store: Store, tracking_uri: str, *, anew: bool = False, within_s: float = float("inf")
) -> list[str]:
    """Deliver the ended runs that no delivery has reached since they ended, in the order in which they did.

    A run that MLflow refuses, or whose artifacts are damaged, does not keep the others back.

    Args:
        store: where the runs are.
        tracking_uri: an MLflow server, or `sqlite:///PATH`.
        anew: also those that were delivered before, for an MLflow that lost its records.
        within_s: begin no further stage after this time, s; what is left is delivered the next time.

    Returns:
        Names of the runs that MLflow was told of.

    Raises:
        LineageError: MLflow cannot be reached, or does not take some of the runs.
    """
    told: list[str] = []
    refused: list[str] = []
    until = time.monotonic() + within_s
    with _alone(store):
        paths = [path for path in store.documents("runs/") if path.endswith("/run.json")]
        records = [record for path in paths if (record := store.read_document_or_none(path)) is not None]
        pending = _pending(store, records, tracking_uri, anew or _is_lost(tracking_uri))
        # What runs at work have finished is found again, as cached, by others.
        for run in [*(record["run"] for record in records if record["status"] not in ENDED), *pending]:
            record_curves(store, run)
        for run in pending:
            try:
                deliver(store, run, tracking_uri, until=until)
            except MlflowAway:
                raise
            except (LineageError, CorruptArtifact) as error:
                refused.append(f"run {run}: {error.message}")
            else:
                told.append(run)
    if refused:
        more = f"; and {len(refused) - MAX_TOLD} more" if len(refused) > MAX_TOLD else ""
        raise LineageError(
            "; ".join(refused[:MAX_TOLD]) + more, hint="what is damaged is told by `tessera store verify`"
        )
    return told


def _pending(store: Store, records: list[dict[str, Any]], tracking_uri: str, anew: bool) -> list[str]:
    """Ended runs without a receipt for how they ended, in the order in which they did."""
    return [
        record["run"]
        for record in sorted(records, key=lambda record: record["finished"] or 0.0)
        if record["status"] in ENDED
        and (anew or store.document(_receipt_path(record["run"])) != _receipt(record, tracking_uri))
    ]


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Wait until no other process of this machine delivers from the store; two at once would tell things twice."""
    store.local.mkdir(parents=True, exist_ok=True)
    with (store.local / "mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _tracking(uri: str) -> Iterator["MlflowClient"]:
    """A client of a tracking server that answers, or of a database; whatever MLflow complains of becomes one error."""
    os.environ |= SETTINGS
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT_S))
    _probe(uri)
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if path := _database(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        mlflow.set_tracking_uri(uri)
        yield mlflow.MlflowClient(uri, registry_uri=uri)
    except MlflowException as error:
        status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
        raise _unavailable(uri, _first_line(error), MlflowAway if status >= 500 else LineageError) from error
    except SQLAlchemyError as error:
        raise _unavailable(uri, _first_line(error), LineageError) from error
    except OSError as error:
        raise _unavailable(uri, _first_line(error), MlflowAway) from error


def _probe(uri: str) -> None:
    """Ask a server for a sign of life, for a shorter time than its work may take."""
    if not _is_server(uri):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in shows later
    except (OSError, ValueError) as error:
        raise _unavailable(uri, str(error), MlflowAway) from error


def _unavailable(uri: str, why: str, kind: type[LineageError]) -> LineageError:
    damaged = "; a damaged database: move it away, then `tessera lineage rebuild`" if _database(uri) else ""
    return kind(
        f"MLflow at {_public(uri)} took no records: {why}",
        hint=f"they stay in the store; the next run or `tessera ui` delivers them{damaged}",
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _database(uri: str) -> Path | None:
    """The file of a database; None of a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _is_lost(uri: str) -> bool:
    """Whether there is no database where there may have been one; receipts for it then mean nothing."""
    path = _database(uri)
    return path is not None and not path.exists()


def _public(uri: str) -> str:
    """The address without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _receipt(record: Mapping[str, Any], tracking_uri: str) -> dict[str, Any]:
    """What is left in the store when a run was delivered as it is now."""
    return {"tracking_uri": _public(tracking_uri), "finished": record["finished"], "status": record["status"]}


def _receipt_path(run: str) -> str:
    return f"runs/{run}/mlflow.json"
