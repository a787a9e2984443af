"""Commands on the records of runs: runs, report, lineage, ui."""

from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.options import DEFAULT_STORE, AsJson, RunName, StoreUri, console, print_json

if TYPE_CHECKING:
    from components.core.store.store import Store


def runs(store: StoreUri = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List the runs of a store with their status and duration."""
    from datetime import UTC, datetime

    from rich.table import Table

    from components.core.store.store import open_store
    from pipelines.records.run_lock import mark_dead_runs_where_allowed
    from pipelines.records.runs import run_records

    opened = open_store(store)
    mark_dead_runs_where_allowed(opened)
    records = run_records(opened)
    if as_json:
        print_json(records)
        return
    table = Table("run", "recipe", "started (UTC)", "status", "seconds")
    for record in records:
        started = datetime.fromtimestamp(record["started"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        seconds = "" if record["seconds"] is None else f"{record['seconds']:.1f}"
        table.add_row(record["run"], record["recipe_name"], started, record["status"], seconds)
    console().print(table)


def report(
    run: RunName = "latest",
    store: StoreUri = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's summary.json.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Also compare the run's children with those of another run.")
    ] = None,
    beside: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write the HTML report of a run and print its path; with --json print the summary instead."""
    import webbrowser
    from dataclasses import asdict

    from components.core.base.errors import InputError
    from components.core.store.store import open_store
    from pipelines.records.runs import find_run
    from pipelines.report.compare_runs import compare_runs, print_comparison
    from pipelines.report.summary import build_summary, print_summary
    from pipelines.run.finish_run import report_path

    if beside is not None:
        raise InputError("report has no option --beside", hint=f"it is now called --compare {beside}")
    opened = open_store(store)
    name = find_run(opened, run)
    summary = build_summary(opened, name)
    comparison = compare_runs(opened, name, find_run(opened, compare)) if compare is not None else None
    if as_json:
        print_json({**summary, "comparison": asdict(comparison)} if comparison else summary)
        return
    from pipelines.report.report import write_report

    path = report_path(opened, name)
    write_report(opened, name, path, comparison=comparison)
    screen = console()
    print_summary(summary, screen)
    if comparison:
        print_comparison(comparison, screen)
    screen.print(str(path), highlight=False, soft_wrap=True)
    if open_:
        webbrowser.open(path.resolve().as_uri())


def lineage(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="RUN, RUN/ROLE, a registered model, a digest, an exported folder, a data file (its path or sha256), "
            "or `rebuild`.",
        ),
    ],
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show what a model was made from, down to the files, or which models were made from a file.

    `tessera lineage rebuild` writes the records of all runs to MLflow again, after its database was lost.
    """
    from components.core.store.store import open_store

    opened = open_store(store)
    if what == "rebuild":
        _rebuild(opened, as_json)
        return
    from pipelines.lineage.ancestry import LineageGraph, artifact_tree, file_digest, file_tree, find_artifact

    sha256 = file_digest(opened, what)
    graph = LineageGraph(opened)
    found = graph.of_artifact(find_artifact(opened, what)) if sha256 is None else graph.of_file(sha256)
    if as_json:
        print_json(found)
    else:
        console().print(artifact_tree(found) if sha256 is None else file_tree(found))


def _rebuild(store: "Store", as_json: bool) -> None:
    """Write the records of all runs to MLflow again."""
    from pipelines.run.finish_run import rebuild_lineage

    rebuilt = rebuild_lineage(store)
    if as_json:
        print_json(rebuilt)
    else:
        names = f": {', '.join(rebuilt)}" if rebuilt else ""
        console().print(f"MLflow has the records of {len(rebuilt)} runs again{names}", highlight=False, soft_wrap=True)


def ui(
    port: Annotated[int, typer.Option(help="Port on the loopback interface.")] = 5000,
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Start the MLflow UI with the records of all runs; Ctrl-C stops it."""
    import os
    import sys

    from components.core.base.errors import InputError
    from components.core.base.ports import usable_port
    from components.core.store.store import open_store
    from pipelines.run.finish_run import deliver_lineage, tracking_uri

    opened = open_store(store)
    uri = tracking_uri(opened)
    deliver_lineage(opened, console())
    if uri.startswith("http"):
        console().print(f"the records are on a server: {uri}", highlight=False)
        return
    if not (opened.local / "mlflow.db").exists():
        raise InputError(f"no records yet for {store}", hint="tessera run RECIPE makes some")
    usable_port(port)
    console().print(f"http://127.0.0.1:{port}", highlight=False)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    # The server replaces this process, so that a signal to the command reaches the server.
    os.execve(sys.executable, [*command, "--backend-store-uri", uri], environment)
