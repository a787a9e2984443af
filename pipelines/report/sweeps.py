"""Sweeps of a limit as `tessera search sweep` tells them: over a table, or over a run at several batches."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from components.core.base.errors import InputError
from components.search.costs.resources import RESOURCES, TIMES
from components.search.refine.rebatch import at_batch
from components.search.solver.fronts import THROUGHPUT, Point, mark_best, sweep
from components.search.solver.option_table import OptionTable
from components.search.solver.problem import Choice
from components.search.solver.score_file import LayerTable
from components.search.solver.solve import Solution
from components.search.stages.records import SearchTable


@dataclass(frozen=True)
class SweepRow:
    """A point of a sweep, and what its choice is and takes.

    Attributes:
        point: see there.
        names: of the chosen options, in order.
        costs: by name.
    """

    point: Point
    names: tuple[str, ...]
    costs: dict[str, float]

    @property
    def solution(self) -> Solution | None:
        """None where nothing fits."""
        return self.point.solution


def _at_batch(search: SearchTable, batch: int) -> OptionTable:
    """The options of a search with the costs of another batch size."""
    return at_batch(
        search, batch, measurement=search.measurement, parent=search.architecture, processor=search.machine.device
    )


def is_search(path: Path) -> bool:
    """Whether a file is the `search.json` of a run."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(values, dict) and "slots" in values


def of_table(path: Path, name: str, values: Sequence[str], others: Mapping[str, float]) -> list[SweepRow]:
    """Sweep a limit of scores and costs from elsewhere.

    Raises:
        InputError: no such table, a cost that its options do not have, or shares of a parent, which a table has not.
    """
    if any(value.endswith("%") for value in values):
        raise InputError("a table has no parent to take a share of", hint=f"give {name} as numbers")
    layers = LayerTable.read(path)
    found = sweep(lambda limit: layers.problem({**others, **limit}), name, [float(value) for value in values])

    def told(point: Point) -> SweepRow:
        if point.solution is None:
            return SweepRow(point, (), {})
        picked = zip(layers.layers, point.solution.choice, strict=True)
        names = tuple(layer.options[pick].name or str(pick) for layer, pick in picked)
        return SweepRow(point, names, layers.totals(point.solution.choice))

    return [told(point) for point in found]


def of_search(
    search: SearchTable,
    name: str,
    values: Sequence[str],
    others: Mapping[str, float],
    batches: Sequence[int] | None = None,
) -> list[SweepRow]:
    """Sweep a limit of a search, other limits as they were or as given.

    Args:
        search: of a run.
        name: of a cost, or `tokens_per_s`.
        values: numbers, or shares of the parent's.
        others: limits beside.
        batches: sizes to solve for, each with its own costs; the limits of the search on times do not count then.

    Raises:
        InputError: no such cost, or costs at another batch cannot be told.
    """
    known = (*RESOURCES, THROUGHPUT)
    unknown = [given for given in (name, *others) if given not in known]
    if unknown:
        raise InputError(f"a search has no cost {unknown[0]!r}", hint=f"costs are {', '.join(known)}")
    own = {limit: most for limit, most in search.limits.items() if batches is None or limit not in TIMES}
    tables: dict[int | None, OptionTable] = (
        {None: search} if batches is None else {b: _at_batch(search, b) for b in batches}
    )
    fronts = [_front(table, name, values, {**own, **others}, batch) for batch, table in tables.items()]
    return [
        _told(point, table) for front, table in zip(mark_best(fronts), tables.values(), strict=True) for point in front
    ]


def _front(
    table: OptionTable, name: str, values: Sequence[str], others: Mapping[str, float], batch: int | None
) -> list[Point]:
    """Sweep at one batch."""
    parent = _totals(table, table.parent_choice)
    unknown = [limit for limit in (name, *others) if not parent.get(limit)]
    if unknown:
        raise InputError(f"the costs of this search do not know {unknown[0]}", hint=f"they know {', '.join(parent)}")
    shares = [value.endswith("%") for value in values]
    numbers = [float(value.removesuffix("%")) for value in values]
    limits = [number / 100 * parent[name] if share else number for number, share in zip(numbers, shares, strict=True)]

    def most(limits: Mapping[str, float]) -> dict[str, float]:
        """Throughput as a most."""
        budgets = {limit: value for limit, value in limits.items() if limit != THROUGHPUT}
        if limits.get(THROUGHPUT):
            budget = 1000 * table.batch_tokens / limits[THROUGHPUT]
            budgets["request_ms"] = min(budget, budgets.get("request_ms", budget))
        return budgets

    base = {limit: value for limit, value in others.items() if limit != name}
    return sweep(lambda limit: table.problem(table.scores, most({**base, **limit})), name, limits, batch)


def _totals(table: OptionTable, choice: Choice) -> dict[str, float]:
    """What a choice takes of everything that is known, and its throughput."""
    costs = table.costs(choice)
    told = {resource: costs.of(resource) for resource in RESOURCES if costs.of(resource)}
    if table.batch_tokens and costs.request_ms:
        told[THROUGHPUT] = 1000 * table.batch_tokens / costs.request_ms
    return told


def _told(point: Point, table: OptionTable) -> SweepRow:
    if point.solution is None:
        return SweepRow(point, (), {})
    choice = point.solution.choice
    names = tuple(slot.options[pick].name for slot, pick in zip(table.slots, choice, strict=True))
    return SweepRow(point, names, _totals(table, choice))


def as_json(told: SweepRow) -> dict[str, object]:
    """A point as `--json` prints it."""
    point, solution = told.point, told.solution
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
        "names": list(told.names),
        "costs": told.costs,
    }


def write_csv(found: Sequence[SweepRow], path: Path) -> None:
    """Write a row a point: batch, limit, status, score, every cost, and the chosen options."""
    names = next((list(told.costs) for told in found if told.costs), [])
    with path.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["batch", "best", "limit", "status", "objective", "bound", *names, "choice"])
        for told in found:
            point, solution = told.point, told.solution
            head = [point.batch or "", int(point.best), point.limit]
            if solution is None:
                rows.writerow([*head, "infeasible", "", "", *([""] * len(names)), ""])
                continue
            told_costs = [told.costs.get(name, 0) for name in names]
            rows.writerow(
                [*head, solution.status, solution.objective, solution.bound, *told_costs, " ".join(told.names)]
            )


def as_table(found: Sequence[SweepRow], name: str) -> Table:
    """The points for people to read."""
    shown = [cost for cost in SHOWN if any(cost in told.costs for told in found)]
    extra = [] if name in shown or not any(name in told.costs for told in found) else [name]
    table = Table("batch", f"limit {name}", "score", "gap", *extra, *shown, "")
    for told in found:
        point, solution = told.point, told.solution
        batch = "" if point.batch is None else str(point.batch)
        if solution is None:
            table.add_row(batch, f"{point.limit:,.6g}", "none fits")
            continue
        costs = [f"{told.costs.get(cost, 0):,.5g}" for cost in (*extra, *shown)]
        mark = "best" if point.best and point.batch is not None else ""
        table.add_row(batch, f"{point.limit:,.6g}", f"{solution.objective:.4g}", f"{solution.gap:.2g}", *costs, mark)
    return table


SHOWN = ("parameters", "memory_bytes", "latency_ms", "time_to_first_token_ms", THROUGHPUT)
"""Costs that people are shown, beside the swept one."""
