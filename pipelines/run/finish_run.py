"""The end of a run: curves, summary, report and lineage, and where to find them."""

import os
from pathlib import Path

from rich.console import Console

from components.core.base.errors import TesseraError
from components.core.lineage.curves import record_curves
from components.core.runtime.stage_command import TRACKING_URI
from components.core.store.store import Store, open_store
from pipelines.records.run_lock import mark_dead_runs_where_allowed

DELIVERY_S = 120.0
"""Longest time that the end of a run delivers to MLflow; the next delivery continues."""


def deliver_run(store_uri: str, run: str, console: Console) -> None:
    """Write what a finished run shows, print its table, and say where everything is."""
    from pipelines.report.report import write_report
    from pipelines.report.summary import build_summary, print_summary

    store = open_store(store_uri)
    record_curves(store, run)
    summary = build_summary(store, run)
    store.put_document(f"runs/{run}/summary.json", summary)
    report = report_path(store, run)
    write_report(store, run, report)
    store.put_text(f"runs/{run}/report.html", report.read_text(encoding="utf-8"))
    deliver_lineage(store, console, run)
    print_summary(summary, console)
    option = "" if store_uri == ".tessera" else f" --store {store_uri}"
    places = {"report": str(report), "MLflow": f"tessera ui{option}", "chat": f"tessera chat {run}{option}"}
    for what, where in places.items():
        console.print(f"{what:7} {where}", markup=False, highlight=False, soft_wrap=True)


def deliver_lineage(store: Store, console: Console, run: str | None = None) -> None:
    """Deliver all runs that MLflow lacks; a server that is away or slow is no reason to fail.

    Args:
        store: where the runs are.
        console: shows why something was not delivered, and which runs before `run` now were.
        run: the run that has just ended.
    """
    from components.core.lineage.replay import sync_pending_runs

    mark_dead_runs_where_allowed(store)
    try:
        delivered = sync_pending_runs(store, tracking_uri(store), within_s=DELIVERY_S)
    except TesseraError as error:
        console.print(f"not delivered to MLflow: {error}", style="yellow", markup=False, soft_wrap=True)
        return
    if older := [name for name in delivered if name != run]:
        console.print(f"delivered to MLflow, from earlier runs: {', '.join(older)}", highlight=False, soft_wrap=True)


def rebuild_lineage(store: Store) -> list[str]:
    """Deliver all runs to MLflow, also those that were delivered before; returns their names.

    Raises:
        LineageError: MLflow cannot be reached or refuses.
    """
    from components.core.lineage.replay import sync_pending_runs

    mark_dead_runs_where_allowed(store)
    return sync_pending_runs(store, tracking_uri(store), anew=True)


def report_path(store: Store, run: str) -> Path:
    """Where the report of a run is written on this machine."""
    return store.local / "runs" / run / "report.html"


def tracking_uri(store: Store) -> str:
    """Address of MLflow: a server that the environment names, or an SQLite database in the store's local folder."""
    from components.core.lineage.tracking import sqlite_uri

    return os.environ.get(TRACKING_URI) or sqlite_uri((store.local / "mlflow.db").resolve())
