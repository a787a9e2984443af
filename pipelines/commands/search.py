"""`tessera search`: solve tables of scores and costs, explain a child's layers, check the proof that it is the best."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pipelines.commands.options import DEFAULT_STORE, AsJson, RunName, StoreUri, console, print_json

if TYPE_CHECKING:
    from components.core.base.config import Config
    from components.search.solver.explain import Alternative
    from components.search.solver.score_file import LayerTable
    from components.search.stages.records import SearchTable

ConfigT = TypeVar("ConfigT", bound="Config")

search_app = typer.Typer(no_args_is_help=True, help="Choose, explain and check what the layers of a child hold.")


@search_app.command()
def solve(
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help='{"layers": [{"options": [{"name", "score", "costs"}]}]} as JSON.')
    ],
    limits: Annotated[
        list[str], typer.Option("--limit", metavar="NAME=VALUE", help="The most that a cost may sum to. Repeatable.")
    ] = [],  # noqa: B006
    fixed: Annotated[
        list[str], typer.Option("--fix", metavar="LAYER=OPTION", help="Numbers of a layer and its option. Repeatable.")
    ] = [],  # noqa: B006
    pool: Annotated[int, typer.Option(min=1, metavar="K", help="Also the next best, up to K in all.")] = 1,
    distance: Annotated[int, typer.Option(min=1, help="Layers in which any two of the pool differ at least.")] = 1,
    time_limit: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Then the best so far comes with its gap.")
    ] = float("inf"),
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the proof of the best, for `tessera search check`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose an option a layer with the lowest sum of scores within limits, exactly, from a table of your own."""
    import time

    from components.search.solver.score_file import LayerTable
    from components.search.solver.solve import certify
    from components.search.solver.solve import pool as find_pool

    started = time.monotonic()
    layers = LayerTable.read(table)
    bounds, held = _limits(limits), _fixed(fixed, layers)
    problem = layers.problem(bounds)
    solutions = find_pool(problem.with_fixed(held), pool, distance=distance, time_limit_s=time_limit)
    if not solutions:
        _tell_conflict(layers, bounds, held, started, as_json=as_json)
        raise typer.Exit(1)
    if certificate is not None:
        proof = certify(problem, solutions[0].choice, fixed=held)
        certificate.write_text(proof.model_dump_json(exclude_defaults=True) + "\n", encoding="utf-8")
    told: list[dict[str, Any]] = [
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
    result = {**told[0], "seconds": time.monotonic() - started}
    if pool > 1:
        result["pool"] = told
    if as_json:
        print_json(result)
        return
    for number, solution in enumerate(told):
        print_choice(layers, solution, heading=f"{number + 1}. " if pool > 1 else "")


@search_app.command()
def sweep(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A run, its search.json, or a TABLE as for `solve`.")],
    limits: Annotated[
        list[str],
        typer.Option(
            "--limit",
            metavar="NAME=LOW..HIGH",
            help="The limit to sweep; `%` is a share of the parent's. Others stay as they are, or are NAME=VALUE.",
        ),
    ],
    points: Annotated[int, typer.Option(min=1, metavar="N", help="Values from LOW to HIGH.")] = 9,
    batch: Annotated[
        str | None,
        typer.Option(metavar="SIZES", help="Batch sizes such as 1,8,32, of a run; its limits on times then fall away."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the points, with all costs.")] = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """The best choice at each of many limits: a Pareto front over any cost, or over throughput (tokens_per_s)."""
    from pipelines.report import sweeps

    name, values, others = _swept(limits, points)
    if Path(what).is_file() and not sweeps.is_search(Path(what)):
        if batch is not None:
            from components.core.base.errors import InputError

            raise InputError("--batch is for runs: a table has the costs of one batch", hint="leave --batch out")
        found = sweeps.of_table(Path(what), name, values, others)
    else:
        sizes = None if batch is None else _batches(batch)
        found = sweeps.of_search(_search_table(what, store), name, values, others, sizes)
    if csv is not None:
        sweeps.write_csv(found, csv)
    if as_json:
        print_json({"limit": name, "points": [sweeps.as_json(point) for point in found]})
    else:
        console().print(sweeps.as_table(found, name))
    if not any(point.solution for point in found):
        raise typer.Exit(1)


@search_app.command()
def explain(
    run: RunName,
    layer: Annotated[int, typer.Option(metavar="N", help="Layer of the parent, from 0.")],
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Say why a layer of a run's child is as it is, and what the best child with another sub-block there would cost."""
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
        shown = Table("option", "own score", "best child", "difference", "others changed", *resources)
        for alternative in reason.alternatives:
            costs = alternative.costs
            shown.add_row(
                f"{alternative.option} (chosen)" if alternative.chosen else alternative.option,
                f"{alternative.score:.4g}",
                "none fits" if alternative.objective is None else f"{alternative.objective:.4g}",
                _difference(alternative),
                "" if alternative.changed is None else str(alternative.changed),
                *("" if costs is None else _shown(costs.of(name)) for name in resources),
            )
        screen.print(shown)


@search_app.command()
def export(
    run: RunName,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Takes the files; created.")],
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Write all that a search knows as JSON and CSV: options, choices, fronts, margins, measurements, fusion."""
    import json

    from components.core.store.store import open_store
    from components.search.costs.records import COSTS_FILE
    from components.search.stages.records import TABLE_FILE
    from pipelines.records import runs
    from pipelines.report.search_export import export_search

    opened = open_store(store)
    table = json.loads(opened.read(runs.artifact(opened, run, "search"), TABLE_FILE))
    measured = runs.artifacts(opened, runs.find_run(opened, run)).get("costs")
    costs = json.loads(opened.read(measured, COSTS_FILE)) if measured else None
    written = export_search(table, costs, folder)
    if as_json:
        print_json([str(path) for path in written])
        return
    for path in written:
        console().print(str(path), highlight=False)


@search_app.command()
def check(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A run, a search.json, or the TABLE of a certificate.")],
    certificate: Annotated[
        Path | None, typer.Argument(metavar="CERTIFICATE", help="What `search solve --certificate` wrote.")
    ] = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Verify from the table alone, in exact arithmetic and without the solver, that a choice is the best."""
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
            raise InputError("this search kept no certificate", hint="run it again: earlier versions kept none")
        proof = table.certificate
        if proof.limits != table.limits or proof.choice != table.best_choice:
            raise WrongCertificate("the certificate is about other limits or another choice than the child's")
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
    told = (
        "the choice is the best within its limits" if gap == 0 else f"no choice is better by more than {float(gap):.2g}"
    )
    console().print(f"{told}: score {result['objective']:.6g}; proof of {len(proof.nodes)} nodes", highlight=False)


def print_choice(layers: "LayerTable", solution: dict[str, Any], heading: str) -> None:
    """A choice for people to read."""
    screen = console()
    costs = ", ".join(f"{name} {_shown(value)}" for name, value in solution["costs"].items())
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


def _tell_conflict(
    layers: "LayerTable", limits: dict[str, float], fixed: dict[int, int], started: float, *, as_json: bool
) -> None:
    """Say which limits cannot be met together."""
    import time

    from components.search.solver.infeasibility import find_conflict

    best = find_conflict(layers.problem(limits).with_fixed(fixed))
    seconds = time.monotonic() - started
    if as_json:
        print_json({"status": "infeasible", "conflict": list(best), "best": best, "seconds": seconds})
        return
    reach = ", ".join(f"{name} {limits[name]:,.6g} (at best {value:,.6g})" for name, value in best.items())
    console().print(
        f"infeasible: no choice meets {reach or 'all limits'}" + (" together" if len(best) > 1 else ""), highlight=False
    )


def _difference(alternative: "Alternative") -> str:
    """What the best child with an option scores more, and the noise of that where it is known."""
    if alternative.difference is None:
        return ""
    error = "" if alternative.error is None else f" ± {alternative.error:.2g}"
    return f"{alternative.difference:+.4g}{error}" + (", within the noise" if alternative.within_noise else "")


def _shown(value: float) -> str:
    """A cost as people read it: whole numbers in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _limits(pairs: list[str]) -> dict[str, float]:
    """NAME=VALUE pairs as numbers."""
    import math

    from components.core.base.errors import InputError

    limits: dict[str, float] = {}
    for pair in pairs:
        name, equals, value = pair.rpartition("=")
        try:
            limit = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
        except ValueError:
            limit = math.nan
        if not equals or not name or not math.isfinite(limit):
            raise InputError(f"--limit {pair!r} is not of the form NAME=VALUE with a finite number")
        if name in limits:
            raise InputError(f"--limit {name} is given twice", hint="leave one out")
        limits[name] = limit
    return limits


def _swept(texts: list[str], points: int) -> tuple[str, list[str], dict[str, float]]:
    """The name of the limit that is swept, its values as text, and the other limits."""
    from components.core.base.errors import InputError

    swept = [text for text in texts if ".." in text.rpartition("=")[2]]
    if len(swept) != 1:
        raise InputError(
            f"{len(swept)} limits are swept", hint="give one --limit NAME=LOW..HIGH, such as latency_ms=30%..100%"
        )
    name, _, both = swept[0].rpartition("=")
    low, _, high = both.partition("..")
    share = "%" if high.endswith("%") else ""
    try:
        least, most = float(low.removesuffix("%")), float(high.removesuffix("%"))
    except ValueError:
        raise InputError(f"--limit {swept[0]!r} is not of the form NAME=LOW..HIGH with numbers") from None
    if not name or bool(share) != low.endswith("%") or not 0 <= least <= most < float("inf"):
        raise InputError(f"--limit {swept[0]!r} is not of the form NAME=LOW..HIGH, both numbers or both shares")
    steps = [least + (most - least) * k / max(1, points - 1) for k in range(points)]
    return name, [f"{step:.12g}{share}" for step in steps], _limits([text for text in texts if text not in swept])


def _batches(text: str) -> list[int]:
    """Batch sizes that are separated by commas."""
    from components.core.base.errors import InputError

    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(f"--batch {text!r} is not a list of batch sizes such as 1,8,32")
    return [int(size) for size in sizes]


def _fixed(pairs: list[str], layers: "LayerTable") -> dict[int, int]:
    """LAYER=OPTION pairs as numbers."""
    from components.core.base.errors import InputError

    fixed: dict[int, int] = {}
    for pair in pairs:
        layer, _, option = pair.partition("=")
        if not (layer.isdecimal() and option.isdecimal()):
            raise InputError(f"--fix {pair!r} is not of the form LAYER=OPTION with two numbers, from 0")
        if int(layer) >= len(layers.layers) or int(option) >= len(layers.layers[int(layer)].options):
            raise InputError(f"--fix {pair}: the table has no such layer or option", hint="both are numbered from 0")
        fixed[int(layer)] = int(option)
    return fixed


def _search_table(what: str, store: str) -> "SearchTable":
    """The `search.json` of a path, or of a run."""
    from components.core.store.store import open_store
    from components.search.stages.records import TABLE_FILE, SearchTable
    from pipelines.records import runs

    if Path(what).is_file():
        return _read(SearchTable, Path(what))
    opened = open_store(store)
    return SearchTable.model_validate_json(opened.read(runs.artifact(opened, what, "search"), TABLE_FILE))


def _read(record: "type[ConfigT]", path: Path) -> "ConfigT":
    """A record from a JSON file."""
    import json

    from components.core.base.errors import InputError

    try:
        return record.parse(json.loads(path.read_bytes()), where=path.name)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
