"""`tessera search`: solve tables of scores and costs, explain the choice of a child, verify its certificate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    RunName,
    StoreUri,
    console,
    parse_batch_sizes,
    parse_fixed_options,
    parse_limits,
    parse_swept_limit,
    print_json,
)

if TYPE_CHECKING:
    from components.core.base.config import Config
    from components.search.search_table import SearchTable
    from components.search.solver.explain import Alternative
    from components.search.solver.score_file import LayerTable

ConfigT = TypeVar("ConfigT", bound="Config")

search_app = typer.Typer(no_args_is_help=True, help="Choose the layers of a child, explain the choice and verify it.")


@search_app.command()
def solve(
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help='{"layers": [{"options": [{"name", "score", "costs"}]}]} as JSON.')
    ],
    limits: Annotated[
        list[str], typer.Option("--limit", metavar="NAME=VALUE", help="Upper limit of the sum of a cost. Repeatable.")
    ] = [],  # noqa: B006
    fixed: Annotated[
        list[str], typer.Option("--fix", metavar="LAYER=OPTION", help="Numbers of a layer and its option. Repeatable.")
    ] = [],  # noqa: B006
    pool: Annotated[int, typer.Option(min=1, metavar="K", help="Print the K best choices.")] = 1,
    distance: Annotated[
        int, typer.Option(min=1, help="Number of layers in which any two of these differ, at least.")
    ] = 1,
    time_limit: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="After it, print the best choice so far with its gap.")
    ] = float("inf"),
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the proof of the best, for `tessera search check`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose one option per layer with the lowest sum of scores within limits, exactly, from your own table."""
    import time

    from components.search.solver.score_file import LayerTable
    from components.search.solver.solve import certify
    from components.search.solver.solve import pool as find_pool

    started = time.monotonic()
    layers = LayerTable.read(table)
    bounds, fixed_options = parse_limits(limits), parse_fixed_options(fixed, layers)
    problem = layers.problem(bounds)
    solutions = find_pool(problem.with_fixed(fixed_options), pool, distance=distance, time_limit_s=time_limit)
    if not solutions:
        _report_conflict(layers, bounds, fixed_options, started, as_json=as_json)
        raise typer.Exit(1)
    if certificate is not None:
        proof = certify(problem, solutions[0].choice, fixed=fixed_options)
        certificate.write_text(proof.model_dump_json(exclude_defaults=True) + "\n", encoding="utf-8")
    results: list[dict[str, Any]] = [
        {
            "status": solution.status,
            "objective": solution.objective,
            "bound": solution.bound,
            "gap": solution.gap,
            "choice": list(solution.choice),
            "costs": layers.totals(solution.choice),
        }
        for solution in solutions
    ]
    result = {**results[0], "seconds": time.monotonic() - started}
    if pool > 1:
        result["pool"] = results
    if as_json:
        print_json(result)
        return
    for number, solution in enumerate(results):
        print_choice(layers, solution, heading=f"{number + 1}. " if pool > 1 else "")


@search_app.command()
def sweep(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A run, its search.json, or a TABLE as for `solve`.")],
    limits: Annotated[
        list[str],
        typer.Option(
            "--limit",
            metavar="NAME=LOW..HIGH",
            help="The limit to sweep; `%` is a share of the parent's. Change other limits with NAME=VALUE.",
        ),
    ],
    points: Annotated[int, typer.Option(min=1, metavar="N", help="Values from LOW to HIGH.")] = 9,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES", help="Batch sizes such as 1,8,32, for a run; its own limits on times are then ignored."
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the points with all their costs.")] = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Solve for a range of limits: a Pareto front over any cost, or over throughput (tokens_per_s)."""
    from pipelines.report import sweeps
    from pipelines.report.search_export import write_csv

    name, values, others = parse_swept_limit(limits, points)
    if Path(what).is_file() and not sweeps.is_search_table(Path(what)):
        if batch is not None:
            from components.core.base.errors import InputError

            raise InputError("--batch is for runs: a table has the costs of one batch", hint="leave --batch out")
        rows = sweeps.sweep_table(Path(what), name, values, others)
    else:
        sizes = None if batch is None else parse_batch_sizes(batch)
        rows = sweeps.sweep_search(_search_table(what, store), name, values, others, sizes)
    if csv is not None:
        write_csv(csv, map(sweeps.csv_row, rows))
    if as_json:
        print_json({"limit": name, "points": [sweeps.row_json(row) for row in rows]})
    else:
        console().print(sweeps.terminal_table(rows, name))
    if not any(row.solution for row in rows):
        raise typer.Exit(1)


@search_app.command()
def explain(
    run: RunName,
    layer: Annotated[int, typer.Option(metavar="N", help="Layer of the parent, from 0.")],
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Explain the choice at one layer, and what the best child with another sub-block there would cost."""
    from dataclasses import asdict

    from rich.table import Table

    from components.core.base.errors import InputError
    from components.search.costs.resources import RESOURCES
    from components.search.solver.explain import explain_layer

    usual = ("parameters", "kv_bytes_per_token", "latency_ms")
    found = _search_table(run, store)
    resources = [name for name in RESOURCES if name in (*usual, *found.limits)]
    last = max(slot.layer for slot in found.slots)
    if layer not in range(last + 1):
        raise InputError(f"the parent has no layer {layer}", hint=f"layers are numbered 0 to {last}")
    margins = found.margins if found.child.choice == found.best_choice else ()
    reasons = explain_layer(found, found.limits, found.child.choice, layer, margins)
    if as_json:
        slots = [
            {
                **asdict(reason),
                "alternatives": [
                    {
                        **vars(alternative),
                        "own_costs": alternative.own_costs.model_dump(),
                        "costs": alternative.costs and alternative.costs.model_dump(),
                    }
                    for alternative in reason.alternatives
                ],
            }
            for reason in reasons
        ]
        print_json({"layer": layer, "limits": found.limits, "score": found.child.score, "slots": slots})
        return
    screen = console()
    for reason in reasons:
        screen.print(f"{reason.part} of layer {layer}: {reason.chosen}; {reason.reason}", highlight=False)
        table = Table("option", "own score", "best child", "difference", "others changed", *resources)
        for alternative in reason.alternatives:
            costs = alternative.costs
            table.add_row(
                f"{alternative.option} (chosen)" if alternative.chosen else alternative.option,
                f"{alternative.score:.4g}",
                "none fits" if alternative.objective is None else f"{alternative.objective:.4g}",
                _difference(alternative),
                "" if alternative.changed is None else str(alternative.changed),
                *("" if costs is None else _format_cost(costs.of(name)) for name in resources),
            )
        screen.print(table)


@search_app.command()
def export(
    run: RunName,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the files; created if missing.")],
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Write the results of a search as JSON and CSV: options, choices, fronts, margins, measurements, fusion."""
    from components.core.store.store import open_store
    from components.search.costs.resources import COSTS_FILE
    from components.search.search_table import TABLE_FILE
    from pipelines.records import runs
    from pipelines.report.search_export import export_search

    opened = open_store(store)
    name = runs.find_run(opened, run)
    runs.artifact(opened, name, "search")  # says so where the run has not come so far
    table = runs.read_table(opened, name, "search", TABLE_FILE) or {}
    written = export_search(table, runs.read_table(opened, name, "costs", COSTS_FILE), folder)
    if as_json:
        print_json([str(path) for path in written])
        return
    for path in written:
        console().print(str(path), highlight=False)


@search_app.command()
def check(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A run, a search.json, or the TABLE of a certificate.")],
    certificate: Annotated[
        Path | None, typer.Argument(metavar="CERTIFICATE", help="File that `search solve --certificate` wrote.")
    ] = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Verify that a choice is the best, from the table alone, in exact arithmetic and without the solver."""
    from fractions import Fraction

    from components.core.base.errors import InputError
    from components.search.solver.certificate import Certificate, WrongCertificate
    from components.search.solver.certificate import check as verify
    from components.search.solver.score_file import LayerTable

    if certificate is not None:
        layers = LayerTable.read(Path(what))
        proof = _read(Certificate, certificate)
        gap = verify(layers.scores, {name: layers.costs(name) for name in layers.names()}, proof)
    else:
        table = _search_table(what, store)
        if table.certificate is None:
            raise InputError("this search has no certificate", hint="run it again: earlier versions wrote none")
        proof = table.certificate
        if proof.limits != table.limits or proof.choice != table.best_choice:
            raise WrongCertificate("the certificate belongs to other limits or another choice than the child's")
        costs = {name: table.costs_of(name) for name in table.limits}
        gap = verify(table.scores, costs, proof, table.fixed.model_dump())
    result = {
        "certified": "optimal" if gap == 0 else "bound",
        "objective": float(Fraction(proof.objective)),
        "bound": float(Fraction(proof.bound)),
        "gap": float(gap),
        "limits": proof.limits,
        "choice": list(proof.choice),
        "nodes": len(proof.nodes),
    }
    if as_json:
        print_json(result)
        return
    verdict = (
        "the choice is the best within its limits" if gap == 0 else f"no choice is better by more than {float(gap):.2g}"
    )
    console().print(f"{verdict}: score {result['objective']:.6g}; proof of {len(proof.nodes)} nodes", highlight=False)


def print_choice(layers: "LayerTable", solution: dict[str, Any], heading: str) -> None:
    """Print a choice for the terminal."""
    screen = console()
    costs = ", ".join(f"{name} {_format_cost(value)}" for name, value in solution["costs"].items())
    screen.print(
        f"{heading}{solution['status']}: score {solution['objective']:.6g}, bound {solution['bound']:.6g}, "
        f"gap {solution['gap']:.2g}; {costs}",
        highlight=False,
    )
    names = (
        layer.options[option].name or str(option)
        for layer, option in zip(layers.layers, solution["choice"], strict=True)
    )
    screen.print("  ".join(f"{number}:{name}" for number, name in enumerate(names)), highlight=False)


def _report_conflict(
    layers: "LayerTable", limits: dict[str, float], fixed: dict[int, int], started: float, *, as_json: bool
) -> None:
    """Print which limits cannot be met together."""
    import time

    from components.search.solver.solve import find_conflict

    best = find_conflict(layers.problem(limits).with_fixed(fixed))
    seconds = time.monotonic() - started
    if as_json:
        print_json({"status": "infeasible", "conflict": list(best), "best": best, "seconds": seconds})
        return
    conflict = ", ".join(f"{name} {limits[name]:,.6g} (at best {value:,.6g})" for name, value in best.items())
    console().print(
        f"infeasible: no choice meets {conflict or 'all limits'}" + (" together" if len(best) > 1 else ""),
        highlight=False,
    )


def _difference(alternative: "Alternative") -> str:
    """Score difference of the best child with an option, with its error where that is known."""
    if alternative.difference is None:
        return ""
    error = "" if alternative.error is None else f" ± {alternative.error:.2g}"
    return f"{alternative.difference:+.4g}{error}" + (", within the noise" if alternative.within_noise else "")


def _format_cost(value: float) -> str:
    """Format a cost, whole numbers in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _search_table(what: str, store: str) -> "SearchTable":
    """`search.json` of a run, or at a path."""
    from components.core.store.store import open_store
    from components.search.search_table import TABLE_FILE, SearchTable
    from pipelines.records import runs

    if Path(what).is_file():
        return _read(SearchTable, Path(what))
    opened = open_store(store)
    return SearchTable.model_validate_json(opened.read(runs.artifact(opened, what, "search"), TABLE_FILE))


def _read(record: "type[ConfigT]", path: Path) -> "ConfigT":
    """Read a record from a JSON file."""
    import json

    from components.core.base.errors import InputError

    try:
        return record.parse(json.loads(path.read_bytes()), where=path.name)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
