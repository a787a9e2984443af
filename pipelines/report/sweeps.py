"""Sweeps of a limit for `tessera search sweep`: over a table, or over a run at several batch sizes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from components.core.base.errors import InputError
from components.search.costs.resources import RESOURCES, TIMES
from components.search.search_table import SearchTable
from components.search.solver.fronts import THROUGHPUT, Point, mark_best, sweep
from components.search.solver.option_table import OptionTable, at_batch
from components.search.solver.problem import Choice
from components.search.solver.score_file import LayerTable
from components.search.solver.solve import Solution


@dataclass(frozen=True)
class SweepRow:
    """A point of a sweep with its choice.

    Attributes:
        point: limit and solution.
        names: names of the chosen options, by layer.
        costs: total costs by name.
    """

    point: Point
    names: tuple[str, ...]
    costs: dict[str, float]

    @property
    def solution(self) -> Solution | None:
        """Solution of the point; None where no choice fits."""
        return self.point.solution


def _at_batch(search: SearchTable, batch: int) -> OptionTable:
    """Options of a search with their costs at another batch size."""
    return at_batch(
        search, batch, measurement=search.measurement, parent=search.architecture, processor=search.machine.device
    )


def is_search_table(path: Path) -> bool:
    """Whether a file is a `search.json`."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(values, dict) and "slots" in values


def sweep_table(path: Path, name: str, values: Sequence[str], others: Mapping[str, float]) -> list[SweepRow]:
    """Sweep a limit over a user's table of scores and costs.

    Raises:
        InputError: there is no such table, its options lack the cost, or a limit is a share of the parent.
    """
    if any(value.endswith("%") for value in values):
        raise InputError("a table has no parent to take a share of", hint=f"use numbers for {name}")
    layers = LayerTable.read(path)
    points = sweep(lambda limit: layers.problem({**others, **limit}), name, [float(value) for value in values])

    def row(point: Point) -> SweepRow:
        if point.solution is None:
            return SweepRow(point, (), {})
        picked = zip(layers.layers, point.solution.choice, strict=True)
        names = tuple(layer.options[pick].name or str(pick) for layer, pick in picked)
        return SweepRow(point, names, layers.totals(point.solution.choice))

    return [row(point) for point in points]


def sweep_search(
    search: SearchTable,
    name: str,
    values: Sequence[str],
    others: Mapping[str, float],
    batches: Sequence[int] | None = None,
) -> list[SweepRow]:
    """Sweep a limit of a search; its other limits stay unless they are replaced.

    Args:
        search: table of a run.
        name: a cost, or `tokens_per_s`.
        values: numbers, or percentages of the parent's cost.
        others: limits that replace those of the search.
        batches: batch sizes to solve for, each with its own costs; the search's limits on times are then ignored.

    Raises:
        InputError: there is no such cost, or costs at another batch size are unknown.
    """
    known = (*RESOURCES, THROUGHPUT)
    unknown = [limit for limit in (name, *others) if limit not in known]
    if unknown:
        raise InputError(f"a search has no cost {unknown[0]!r}", hint=f"costs are {', '.join(known)}")
    own = {limit: most for limit, most in search.limits.items() if batches is None or limit not in TIMES}
    tables: dict[int | None, OptionTable] = (
        {None: search} if batches is None else {b: _at_batch(search, b) for b in batches}
    )
    fronts = [_front(table, name, values, {**own, **others}, batch) for batch, table in tables.items()]
    return [
        _row(point, table) for front, table in zip(mark_best(fronts), tables.values(), strict=True) for point in front
    ]


def _front(
    table: OptionTable, name: str, values: Sequence[str], others: Mapping[str, float], batch: int | None
) -> list[Point]:
    """Sweep at one batch size."""
    parent = _totals(table, table.parent_choice)
    unknown = [limit for limit in (name, *others) if not parent.get(limit)]
    if unknown:
        raise InputError(f"the costs of this search do not know {unknown[0]}", hint=f"they know {', '.join(parent)}")
    shares = [value.endswith("%") for value in values]
    numbers = [float(value.removesuffix("%")) for value in values]
    limits = [number / 100 * parent[name] if share else number for number, share in zip(numbers, shares, strict=True)]

    def cost_limits(limits: Mapping[str, float]) -> dict[str, float]:
        """Replace a throughput by the request time that it allows."""
        budgets = {limit: value for limit, value in limits.items() if limit != THROUGHPUT}
        if limits.get(THROUGHPUT):
            budget = 1000 * table.batch_tokens / limits[THROUGHPUT]
            budgets["request_ms"] = min(budget, budgets.get("request_ms", budget))
        return budgets

    base = {limit: value for limit, value in others.items() if limit != name}
    return sweep(lambda limit: table.problem(table.scores, cost_limits({**base, **limit})), name, limits, batch)


def _totals(table: OptionTable, choice: Choice) -> dict[str, float]:
    """Costs of a choice that are known, and its throughput."""
    costs = table.costs(choice)
    totals = {resource: costs.of(resource) for resource in RESOURCES if costs.of(resource)}
    if table.batch_tokens and costs.request_ms:
        totals[THROUGHPUT] = 1000 * table.batch_tokens / costs.request_ms
    return totals


def _row(point: Point, table: OptionTable) -> SweepRow:
    if point.solution is None:
        return SweepRow(point, (), {})
    choice = point.solution.choice
    names = tuple(slot.options[pick].name for slot, pick in zip(table.slots, choice, strict=True))
    return SweepRow(point, names, _totals(table, choice))


def row_json(row: SweepRow) -> dict[str, object]:
    """A row as `--json` prints it."""
    point, solution = row.point, row.solution
    batch = {} if point.batch is None else {"batch": point.batch, "best": point.best}
    if solution is None:
        return {**batch, "limit": point.limit, "status": "infeasible"}
    return {
        **batch,
        "limit": point.limit,
        "status": solution.status,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "choice": list(solution.choice),
        "names": list(row.names),
        "costs": row.costs,
    }


def csv_row(row: SweepRow) -> dict[str, object]:
    """A row as `--csv` writes it: a column for each cost, and the names of the chosen options as one text."""
    plain = {name: value for name, value in row_json(row).items() if name not in ("choice", "names", "costs")}
    return {**plain, **row.costs, "choice": " ".join(row.names)}


def terminal_table(rows: Sequence[SweepRow], name: str) -> Table:
    """Table of the rows for the terminal."""
    columns = [cost for cost in TABLE_COSTS if any(cost in row.costs for row in rows)]
    extra = [] if name in columns or not any(name in row.costs for row in rows) else [name]
    table = Table("batch", f"limit {name}", "score", "gap", *extra, *columns, "")
    for row in rows:
        point, solution = row.point, row.solution
        batch = "" if point.batch is None else str(point.batch)
        if solution is None:
            table.add_row(batch, f"{point.limit:,.6g}", "none fits")
            continue
        costs = [f"{row.costs.get(cost, 0):,.5g}" for cost in (*extra, *columns)]
        mark = "best" if point.best and point.batch is not None else ""
        table.add_row(batch, f"{point.limit:,.6g}", f"{solution.objective:.4g}", f"{solution.gap:.2g}", *costs, mark)
    return table


TABLE_COSTS = ("parameters", "memory_bytes", "latency_ms", "time_to_first_token_ms", THROUGHPUT)
"""Costs in the terminal's table, besides the swept one."""
