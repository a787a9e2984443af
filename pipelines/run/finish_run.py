"""The end of a run: curves, summary, report and lineage, and where to find them.

    python -m pipelines.run.finish_run --store URI --run NAME --labels JSON --executor-input JSON

is the last container of a run on a cluster: it also records how the run ended.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from components.core.base.errors import TesseraError
from components.core.base.ports import never_proxy_loopback
from components.core.lineage.curves import record_curves
from components.core.runtime.event_mirror import fetch_events
from components.core.runtime.kfp_outputs import REPORT, ExecutorInput, write_failure
from components.core.runtime.stage_command import TRACKING_URI
from components.core.store.store import Store, open_store
from pipelines.records.run_lock import mark_dead_runs_where_allowed
from pipelines.records.runs import end_run, run_record, stage_documents

DELIVERY_S = 120.0
"""Longest time that the end of a run delivers to MLflow; the next delivery continues."""


def deliver_run(store_uri: str, run: str, console: Console) -> None:
    """Write what a finished run shows, print its table, and say where everything is."""
    store = open_store(store_uri)
    summary = _record_results(store, run)
    deliver_lineage(store, console, run)
    show_results(store_uri, run, summary, console)


def _record_results(store: Store, run: str) -> dict[str, Any]:
    """Put curves, summary and report of a run into the store; returns the summary."""
    from pipelines.report.report import write_report
    from pipelines.report.summary import build_summary

    fetch_events(store, run)
    record_curves(store, run)
    summary = build_summary(store, run)
    store.put_document(f"runs/{run}/summary.json", summary)
    report = report_path(store, run)
    write_report(store, run, report)
    store.put_text(f"runs/{run}/report.html", report.read_text(encoding="utf-8"))
    return summary


def show_results(store_uri: str, run: str, summary: dict[str, Any], console: Console) -> None:
    """Print the table of a run whose report is on this machine, and say where everything is."""
    from pipelines.report.summary import print_summary

    store = open_store(store_uri)
    report = report_path(store, run)
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


def fetch_results(store: Store, run: str) -> dict[str, Any]:
    """Bring the report of a run that ended on another machine to this one; returns the summary."""
    from pipelines.report.report import write_report
    from pipelines.report.summary import build_summary

    write_report(store, run, report_path(store, run))
    return build_summary(store, run)


def finish_on_cluster(store: Store, run: str, labels: Sequence[str], executor_input: ExecutorInput) -> None:
    """Record how a run ended on a cluster, deliver it as at the end of a local run, and show the report in KFP.

    Args:
        store: holds the record of the run.
        run: name of the run.
        labels: of all its stages; the run has succeeded if each of them has finished.
        executor_input: takes the report.
    """
    is_complete = set(labels) <= stage_documents(store, run).keys()
    if (
        is_complete or run_record(store, run)["status"] != "interrupted"
    ):  # a user cancelled it, and Argo runs this still
        end_run(store, run, "succeeded" if is_complete else "failed")
    _record_results(store, run)
    if os.environ.get(TRACKING_URI):  # a database of this pod would be lost with it; `tessera ui` delivers later
        deliver_lineage(store, Console(), run)
    places = {"address": f"{store.uri}/runs/{run}/report.html", "mlflow": os.environ.get(TRACKING_URI, "")}
    executor_input.put(REPORT, places, report_path(store, run).read_text(encoding="utf-8"))
    executor_input.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """End the run that the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.run.finish_run", description="End a run on a cluster.")
    parser.add_argument("--store", required=True, metavar="URI")
    parser.add_argument("--run", required=True, metavar="NAME")
    parser.add_argument("--labels", required=True, metavar="JSON", help="list of the labels of all stages")
    parser.add_argument("--executor-input", required=True, metavar="JSON", help="where KFP takes the report from")
    options = parser.parse_args(arguments)
    never_proxy_loopback()
    try:
        executor_input = ExecutorInput(options.executor_input)
        finish_on_cluster(open_store(options.store), options.run, json.loads(options.labels), executor_input)
    except TesseraError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        write_failure(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
