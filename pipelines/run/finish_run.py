"""The end of a run: curves, summary, report and lineage, and where to find them."""

import os
from pathlib import Path

from rich.console import Console

from components.core.base.errors import TesseraError
from components.core.lineage.curves import record_curves
from components.core.store.store import Store, open_store
from pipelines.records.run_lock import mark_dead_runs_where_allowed

DELIVERY_S = 120.0
"""How long the end of a run waits for MLflow; what it has not taken then is delivered the next time."""


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
    """Tell MLflow of all runs that it does not know yet; a server that is away or slow is no reason to fail.

    Args:
        store: where the runs are.
        console: is told of what was not delivered, and of older runs than `run` that now were.
        run: the run that has just ended.
    """
    from components.core.lineage.replay import sync_pending_runs

    mark_dead_runs_where_allowed(store)
    try:
        told = sync_pending_runs(store, tracking_uri(store), within_s=DELIVERY_S)
    except TesseraError as error:
        console.print(f"MLflow was not told: {error}", style="yellow", markup=False, soft_wrap=True)
        return
    if older := [name for name in told if name != run]:
        console.print(f"MLflow was told of earlier runs: {', '.join(older)}", highlight=False, soft_wrap=True)


def rebuild_lineage(store: Store) -> list[str]:
    """Tell MLflow of all runs, whatever it was told before; returns their names.

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
    """Where MLflow keeps its records: a server named by the environment, or a database beside the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(store.local / 'mlflow.db').resolve()}"
