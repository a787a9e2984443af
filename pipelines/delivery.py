"""The end of a run: summary, report and lineage, and where to find them."""

import os
from pathlib import Path

from rich.console import Console

from components.core.runner import events_path
from components.core.store import Store, open_store
from pipelines.progress import read_events
from pipelines.runs import stage_documents


def deliver_run(store_uri: str, run: str, console: Console) -> None:
    """Write what a finished run shows, print its table, and say where everything is."""
    from components.core import lineage
    from pipelines.report import write_report
    from pipelines.summary import build_summary, print_summary

    store = open_store(store_uri)
    events = [
        {"label": label, **event}
        for label in stage_documents(store, run)
        for event in read_events(events_path(store, run, label))
    ]
    lineage.deliver(store, run, events, tracking_uri(store))
    summary = build_summary(store, run)
    store.put_document(f"runs/{run}/summary.json", summary)
    report = report_path(store, run)
    write_report(store, run, report)
    store.put_text(f"runs/{run}/report.html", report.read_text(encoding="utf-8"))
    print_summary(summary, console)
    for what, where in (
        ("report", str(report)),
        ("MLflow", f"tessera ui{_store_option(store_uri)}"),
        ("chat", f"tessera chat {run}{_store_option(store_uri)}"),
    ):
        console.print(f"{what:7} {where}", markup=False, highlight=False, soft_wrap=True)


def report_path(store: Store, run: str) -> Path:
    """Where the report of a run is written on this machine."""
    return store.local / "runs" / run / "report.html"


def tracking_uri(store: Store) -> str:
    """Where MLflow keeps its records: a server named by the environment, or a database beside the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(store.local / 'mlflow.db').resolve()}"


def _store_option(store_uri: str) -> str:
    from pipelines.commands.options import DEFAULT_STORE

    return "" if store_uri == DEFAULT_STORE else f" --store {store_uri}"
