"""Connections to MLflow: a tracking server, or an SQLite database; whatever goes wrong there becomes one error.

MLflow's client would repeat single requests by itself, and with them the creation of a run whose answer was lost. That
is switched off: callers find by tags what MLflow has, and create only what is missing.
"""

import contextlib
import fcntl
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from components.core.base.errors import TesseraError
from components.core.store.store import Store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
REQUEST_TIMEOUT_S = 20
"""Longest wait for an answer, unless the environment sets `MLFLOW_HTTP_REQUEST_TIMEOUT`."""
PROBE_TIMEOUT_S = 5.0


class LineageError(TesseraError):
    """MLflow does not accept records; they stay in the store until it does."""


class MlflowUnavailable(LineageError):
    """MLflow does not answer, or with a server error, or too slowly; it may later."""


@contextlib.contextmanager
def lineage_lock(store: Store) -> Iterator[None]:
    """Hold the store's lock of this machine: two processes that look for a run at once would both create it."""
    store.local.mkdir(parents=True, exist_ok=True)
    with (store.local / "mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def tracking(uri: str) -> Iterator["MlflowClient"]:
    """A client of a server that answers, or of a database, and `mlflow_errors` in the block."""
    os.environ |= SETTINGS
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT_S))
    _probe(uri)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if path := database_path(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
    with mlflow_errors(uri):
        mlflow.set_tracking_uri(uri)
        yield mlflow.MlflowClient(uri, registry_uri=uri)


@contextlib.contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Turn errors of MLflow in the block into one error.

    Raises:
        MlflowUnavailable: a later attempt may succeed.
        LineageError: MLflow refuses, or its database is damaged.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
        raise _failure(uri, _first_line(error), MlflowUnavailable if status >= 500 else LineageError) from error
    except SQLAlchemyError as error:
        raise _failure(uri, _first_line(error), LineageError) from error
    except OSError as error:
        raise _failure(uri, _first_line(error), MlflowUnavailable) from error


def is_server(uri: str) -> bool:
    """Whether the address is that of a tracking server."""
    return uri.startswith(("http://", "https://"))


def sqlite_uri(path: Path) -> str:
    """The tracking URI of a database file.

    SQLAlchemy reads a URL, so `?` and `%` in the path are quoted. MLflow creates the parent folder of a `sqlite:` URI
    as written, which would be another folder then; it does not where the URI names the driver.
    """
    special = {"?", "%"} & set(str(path))
    return f"sqlite+pysqlite:///{quote(str(path))}" if special else f"sqlite:///{path}"


def database_path(uri: str) -> Path | None:
    """The file of an SQLite database; None of a server."""
    found = re.match(r"sqlite(?:\+pysqlite)?:///([^?]*)", uri)
    return Path(unquote(found[1])) if found else None


def without_password(uri: str) -> str:
    """The address without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _probe(uri: str) -> None:
    """Ask a server whether it is up, with a shorter timeout than a request with records has."""
    if not is_server(uri):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        return  # it answers; the first real request shows whether it accepts our credentials
    except (OSError, ValueError) as error:
        raise _failure(uri, str(error), MlflowUnavailable) from error


def _failure(uri: str, why: str, kind: type[LineageError]) -> LineageError:
    damaged = "; a damaged database: move it away, then `tessera lineage rebuild`" if database_path(uri) else ""
    return kind(
        f"MLflow at {without_password(uri)} took no records: {why}",
        hint=f"they stay in the store; the next run or `tessera ui` delivers them{damaged}",
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
