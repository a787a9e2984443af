"""The report of a run: one HTML file that holds everything it shows and sends no request."""

import base64
import functools
import gzip
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from components.core.base.flat_values import flatten
from components.core.lineage.curves import stage_curves
from components.core.model.architecture import Architecture
from components.core.store.store import Store
from pipelines.recipe.llama_nemotron import BASELINES
from pipelines.records.runs import read_table, run_record, stage_documents
from pipelines.report import figures, search_figures, search_tables
from pipelines.report.compare_runs import RunComparison
from pipelines.report.diagrams import ArchitectureMap, lineage_diagram, model_map, search_maps
from pipelines.report.prediction_table import prediction_section
from pipelines.report.summary import MODES, ROW_ORDER, SPLITS, TARGETS, build_summary, format_duration
from pipelines.report.task_table import task_table

HERE = Path(__file__).parent


def write_report(store: Store, run: str, out: Path, *, comparison: RunComparison | None = None) -> None:
    """Write the report of a run, with a section for everything that the run has.

    Args:
        store: has the records, curves and artifacts of the run.
        run: name of the run.
        out: the HTML file.
        comparison: of this run with another.
    """
    record, summary = run_record(store, run), build_summary(store, run)
    search = read_table(store, run, "search", "search.json")
    all_models = {**summary["models"], **summary["baselines"]}
    models = {role: all_models[role] for role in ROW_ORDER if role in all_models}
    page = {
        "run": run,
        "record": record,
        "started": datetime.fromtimestamp(record["started"], UTC).strftime("%d %B %Y, %H:%M UTC"),
        "headlines": list(_headlines(summary)),
        "models": models,
        "baselines": BASELINES,
        "accuracy": figures.accuracy_figure(models),
        "tasks": task_table(models),
        "maps": search_maps(search) if search else _model_maps(store, summary),
        "comparison": comparison,
        "search": _search_section(store, run, search, models) if search else None,
        "curves": {label: figures.curve_figure(curves) for label, curves in _curves(store, run)},
        "lineage": lineage_diagram(store, run, record["sources"]),
        "stages": list(_stage_rows(store, run)),
        "predicted": prediction_section(store, run),
        "settings": _settings(record["recipe"]),
        "splits": SPLITS,
        "modes": MODES,
        "style": Markup((HERE / "report.css").read_text(encoding="utf-8")),
        "plotly": _packed_plotly(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_environment().get_template("report.html.jinja").render(page), encoding="utf-8")


@dataclass(frozen=True)
class Headline:
    """A number at the top of the page; `met` is None for a number without a target."""

    title: str
    value: str
    description: str
    target: str = ""
    met: bool | None = None


def _headlines(summary: Mapping[str, Any]) -> Iterator[Headline]:
    """Targets that were measured, and what the child saves."""
    for target, result in zip(TARGETS, summary["targets"], strict=True):
        if result["value"] is not None:
            notes = [] if result["interval"] is None else [target.format_interval(result["interval"])]
            notes += [] if result["target"] is None else [f"at least {target.format(result['target'])}"]
            yield Headline(target.title, target.format(result["value"]), target.name, "; ".join(notes), result["met"])
    parent, child = (summary["models"].get(role) for role in ("parent", "child"))
    if parent and child:
        for title, key, unit in (
            ("Parameters", "parameters", ""),
            ("On disk", "disk_bytes", " bytes"),
            ("KV cache", "kv_bytes_per_token", " bytes a token"),
        ):
            change = f"{100 * (child[key] / parent[key] - 1):+.0f} %".replace("-", "−")
            yield Headline(title, change, f"{child[key]:,} instead of {parent[key]:,}{unit}")


def _search_section(store: Store, run: str, search: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
    """Tables, sentences and figures on the search."""
    notes = search_tables.slot_notes(search)
    costs = read_table(store, run, "costs", "costs.json")
    return {
        "proof": search_tables.proof_sentence(search),
        "noise": search_tables.noise_sentence(notes),
        "choices": search_tables.choices_table(search),
        "speeds": search_tables.speeds_table(search, models),
        "feedback": search_tables.feedback_table(search),
        "candidates": search_tables.candidates_table(search),
        "fusion": list(search_tables.fusion_sentences(search.get("fusion"))),
        "pareto_figure": search_figures.pareto_figure(search),
        "scores_figure": search_figures.scores_figure(search, notes),
        "costs_figure": search_figures.costs_figure(costs) if costs else None,
        "fusion_figures": list(search_figures.fusion_figures(search.get("fusion"))),
    }


@dataclass(frozen=True)
class StageRow:
    """A stage of the run, as the page lists it."""

    label: str
    cached: bool
    seconds: float
    computed_seconds: float
    key: str
    code: str
    share: float
    """Time as a share of the longest stage's, for the bar."""
    settings: dict[str, Any]
    libraries: dict[str, str]


def _stage_rows(store: Store, run: str) -> Iterator[StageRow]:
    stages = [(document, store.stage_record(document["key"])) for document in stage_documents(store, run).values()]
    longest = max((record.seconds for _, record in stages if record), default=0.0) or 1.0
    for document, record in stages:
        if record is not None:
            yield StageRow(
                label=document["label"],
                cached=document["cached"],
                seconds=document["seconds"],
                computed_seconds=record.seconds,
                key=record.key,
                code=record.code,
                share=record.seconds / longest,
                settings=flatten(record.config),
                libraries=record.libraries,
            )


def _model_maps(store: Store, summary: Mapping[str, Any]) -> dict[str, ArchitectureMap]:
    """Maps of the models of a run without a search, one for each architecture."""
    maps: dict[Architecture, ArchitectureMap] = {}
    for role, model in summary["models"].items():
        architecture = Architecture.from_config(json.loads(store.read(model["digest"], "config.json")))
        maps.setdefault(architecture, model_map(role, architecture))
    return {each.title: each for each in maps.values()}


def _curves(store: Store, run: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Label and curves of each stage that has any; a single value is no curve."""
    for label, document in stage_documents(store, run).items():
        curves = stage_curves(store, document["key"])
        if several := {metric: curve for metric, curve in curves.items() if len(curve["step"]) > 1}:
            yield label, several


def _settings(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by section; those outside any section stand under `recipe`."""
    top = {key: value for key, value in recipe.items() if not isinstance(value, Mapping)}
    sections = {key: flatten(value) for key, value in recipe.items() if isinstance(value, Mapping)}
    return {"recipe": flatten(top), **sections}


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["duration"] = format_duration
    environment.filters["figure"] = figures.figure_json
    return environment


@functools.cache
def _packed_plotly() -> str:
    """plotly.js as base64 of gzip: its 4.8 MB become 1.9 MB, which leaves room for the figures below 5 MB."""
    script = importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(script, mtime=0)).decode()
