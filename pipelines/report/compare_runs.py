"""Comparison of two runs: size, costs and accuracy of their children, for example after one search step and two."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from components.core.lineage.curves import stage_curves
from components.core.store.store import Store
from components.eval.answer_rows import AnswerRow, parse_answers
from components.eval.gains import correctness, paired_gain, select
from pipelines.recipe.llama_nemotron import MODELS
from pipelines.records.runs import artifacts, read_file, read_table, stage_documents
from pipelines.report.summary import MODES, SPLITS, Unit, build_summary, format_value

CHILDREN = MODELS[1:]
"""Roles of the child and of the models trained from it."""
PREDICTED = {
    "memory_bytes": "predicted memory, bytes",
    "latency_ms": "predicted decode step, ms",
    "time_to_first_token_ms": "predicted first token, ms",
    "request_ms": "predicted request, ms",
}
SAME_BUDGET = 0.02
"""Relative difference up to which two limits count as equal: limits given as shares depend on measured costs."""


@dataclass(frozen=True)
class Row:
    """A number that both runs have.

    Attributes:
        role: role of the model.
        name: name of the number, with its unit.
        unit: decides the format.
        values: value of the first run and of the second.
        difference: first minus second, of accuracies over the problems that both runs asked; None where the two cannot
            be compared.
        error: half the width of the difference's confidence interval, where both values have one.
    """

    role: str
    name: str
    unit: Unit
    values: tuple[float, float]
    difference: float | None
    error: float | None = None

    def cells(self) -> tuple[str, str, str]:
        """Both values and the difference as text."""
        first, second = (format_value(value, self.unit) for value in self.values)
        if self.difference is None:
            return first, second, ""
        error = "" if self.error is None else f" ± {format_value(self.error, self.unit)}"
        sign = "−" if self.difference < 0 else "+"
        return first, second, f"{sign}{format_value(abs(self.difference), self.unit)}{error}"


@dataclass(frozen=True)
class RunComparison:
    """Comparison of two runs.

    Attributes:
        runs: their names.
        same_budget: whether their searches had the same limits; None where one run has no search.
        notes: sentences that a reader needs to judge the differences.
        rows: numbers that both runs have.
    """

    runs: tuple[str, str]
    same_budget: bool | None
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


def compare_runs(store: Store, run: str, other: str) -> RunComparison:
    """Compare two runs of one store.

    Args:
        store: has both runs.
        run: name of the first.
        other: name of the second; differences are first minus second.
    """
    runs = (run, other)
    roles = [artifacts(store, name) for name in runs]
    summaries = [build_summary(store, name) for name in runs]
    searches = [read_table(store, name, "search", "search.json") for name in runs]
    same_parent = roles[0].get("parent") == roles[1].get("parent")
    notes = [*_parent_notes(runs, roles)]
    same_budget = None
    if searches[0] and searches[1]:
        different = list(_different_limits(searches[0]["limits"], searches[1]["limits"]))
        same_budget = not different
        notes += [f"The budgets differ: {'; '.join(different)}."] if different else ["The budgets are the same."]
        if searches[0].get("measurement") != searches[1].get("measurement"):
            notes.append("Costs were predicted for different deployments: times and memory are not comparable.")
    else:
        without_search = " and ".join(name for name, search in zip(runs, searches, strict=True) if search is None)
        notes.append(f"Budgets are not known: {without_search} did not search.")
    rows = [
        *(_search_rows(searches[0], searches[1], same_parent=same_parent) if searches[0] and searches[1] else ()),
        *_model_rows(summaries, [_answers(store, name) for name in runs]),
        *_distillation_rows(store, runs, same_parent=same_parent),
    ]
    rows.sort(key=lambda row: CHILDREN.index(row.role))
    return RunComparison(runs, same_budget, tuple(notes), tuple(rows))


def print_comparison(comparison: RunComparison, console: Console) -> None:
    """Print the table of two runs, then the notes."""
    table = Table(
        "model", "", *comparison.runs, "difference", title=f"{comparison.runs[0]} compared with {comparison.runs[1]}"
    )
    for row in comparison.rows:
        table.add_row(row.role, row.name, *row.cells())
    console.print(table)
    for note in comparison.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _parent_notes(runs: tuple[str, str], roles: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Notes on parents that differ."""
    parents = [made.get("parent") for made in roles]
    if parents[0] == parents[1]:
        return
    for one, other in ((0, 1), (1, 0)):
        origin = [role for role, digest in roles[other].items() if digest == parents[one] and role in CHILDREN]
        if origin:
            yield f"{runs[one]} is a second step: its parent is the {origin[0]} model of {runs[other]}."
            break
    else:
        yield "The parents differ."
    yield "Scores and KL are relative to each run's own parent, so they are not compared."


def _different_limits(limits: Mapping[str, float], others: Mapping[str, float]) -> Iterator[str]:
    """Limits that only one search has, or whose values differ."""
    for name in dict.fromkeys([*limits, *others]):
        one, other = limits.get(name), others.get(name)
        if one is None or other is None or not math.isclose(one, other, rel_tol=SAME_BUDGET):
            yield f"{name} {_limit(one)} against {_limit(other)}"


def _limit(value: float | None) -> str:
    return "without limit" if value is None else f"{value:,.6g}"


def _search_rows(search: Mapping[str, Any], other: Mapping[str, Any], *, same_parent: bool) -> Iterator[Row]:
    """Predicted costs, score and KL of both children."""
    children = search["child"], other["child"]
    for name, title in PREDICTED.items():
        values = tuple(child["costs"].get(name) or 0.0 for child in children)
        if all(values):
            yield _row("child", title, "count" if name == "memory_bytes" else "number", values)
    yield _row("child", "score, nats a token", "number", tuple(child["score"] for child in children), same_parent)
    effects = search.get("fusion"), other.get("fusion")
    if effects[0] and effects[1]:
        kls = tuple(effect["kl_after"] for effect in effects if effect)
        yield _row("child", "KL from its parent, nats a token", "number", kls, same_parent)


def _answers(store: Store, run: str) -> Mapping[str, Sequence[AnswerRow]]:
    """Answers of the models of a run by role; empty where none were recorded."""
    data = read_file(store, run, "metrics", "answers.jsonl")
    found: dict[str, list[AnswerRow]] = {}
    for row in parse_answers(data or b""):
        found.setdefault(row.model, []).append(row)
    return found


def _model_rows(
    summaries: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Sequence[AnswerRow]]]
) -> Iterator[Row]:
    """Size, speed and accuracy of each model that both runs have."""
    for role in CHILDREN:
        models = [summary["models"].get(role) for summary in summaries]
        if not (models[0] and models[1]):
            continue
        both = models[0], models[1]
        for key, title in (("parameters", "parameters"), ("kv_bytes_per_token", "KV bytes a token")):
            yield _row(role, title, "count", tuple(model[key] for model in both))
        speeds = tuple(model["tokens_per_second"] for model in both)
        if None not in speeds:
            yield _row(role, "tokens a second", "count", speeds)
        for split in SPLITS:
            for mode in MODES:
                shares = tuple(model["accuracy"][split][mode] for model in both)
                if None not in shares:
                    name, (first, second) = f"{split} problems, thinking {mode}", map(float, shares)
                    own, base = (select(rows.get(role, ()), split, mode) for rows in answers)
                    if gain := paired_gain(base, own, correctness):
                        half = (gain.interval[1] - gain.interval[0]) / 2
                        yield Row(role, name, "share", (first, second), gain.value, half)
                        continue
                    error = _error([model["interval"][split][mode] for model in both])
                    yield _row(role, name, "share", shares, error=error)


def _error(intervals: Sequence[Sequence[float] | None]) -> float | None:
    """Half the width of the confidence interval of a difference of models that were asked different problems.

    None unless both intervals are known.
    """
    halves = [(interval[1] - interval[0]) / 2 for interval in intervals if interval is not None]
    return math.hypot(*halves) if len(halves) == 2 else None


def _distillation_rows(store: Store, runs: tuple[str, str], *, same_parent: bool) -> Iterator[Row]:
    """KL at the end of the distillation."""
    ends = [_last_kl(store, run) for run in runs]
    if None not in ends:
        values = tuple(end for end in ends if end is not None)
        yield _row("distilled", "KL from its parent in training, nats a token", "number", values, same_parent)


def _last_kl(store: Store, run: str) -> float | None:
    """Mean over the last tenth of the distillation's curve."""
    document = stage_documents(store, run).get("distill")
    values = stage_curves(store, document["key"]).get("kl", {}).get("value", []) if document else []
    return statistics.fmean(values[-max(1, len(values) // 10) :]) if values else None


def _row(
    role: str,
    name: str,
    unit: Unit,
    values: tuple[Any, ...],
    comparable: bool = True,
    error: float | None = None,
) -> Row:
    first, second = map(float, values)
    return Row(role, name, unit, (first, second), first - second if comparable else None, error)
