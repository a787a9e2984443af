"""The report of a run: one HTML page that holds everything it shows and asks nothing of any server."""

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

from components.core.lineage.curves import stage_curves
from components.core.lineage.mlflow_entities import flatten
from components.core.model.architecture import Architecture
from components.core.store.store import Store
from pipelines.records.runs import artifacts, run_record, stage_documents
from pipelines.report.block_map import BlockMap, model_map, search_maps
from pipelines.report.compare_runs import RunComparison
from pipelines.report.lineage_rows import run_lineage
from pipelines.report.margins_view import margin_notes
from pipelines.report.search_view import search_view
from pipelines.report.summary import MODES, ROW_ORDER, SPLITS, TARGETS, build_summary

HERE = Path(__file__).parent


def write_report(store: Store, run: str, out: Path, *, beside: RunComparison | None = None) -> None:
    """Write the report of a run; what the run does not have, the report leaves out.

    Args:
        store: where the run left its records, curves and artifacts.
        run: name of the run.
        out: the HTML file.
        beside: another run to compare this one with.
    """
    record, summary = run_record(store, run), build_summary(store, run)
    search = _document(store, run, "search", "search.json")
    models = {**summary["models"], **summary["baselines"]}
    page = {
        "run": run,
        "record": record,
        "started": datetime.fromtimestamp(record["started"], UTC).strftime("%d %B %Y, %H:%M UTC"),
        "headlines": list(_headlines(summary)),
        "models": {role: models[role] for role in ROW_ORDER if role in models},
        "search": search_view(search, models) if search else None,
        "maps": search_maps(search) if search else _model_maps(store, summary),
        "beside": beside,
        "stages": list(_stage_rows(store, run)),
        "lineage": run_lineage(store, run, record["sources"]),
        "settings": _settings(record["recipe"]),
        "splits": SPLITS,
        "modes": MODES,
        "data": _json(
            {
                "curves": _curves(store, run),
                "search": search,
                "margins": _margins(search) if search else {},
                "costs": _document(store, run, "costs", "costs.json"),
                "models": models,
                "order": ROW_ORDER,
            }
        ),
        "style": Markup((HERE / "report.css").read_text(encoding="utf-8")),
        "script": Markup((HERE / "report.js").read_text(encoding="utf-8")),
        "plotly": _plotly(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_environment().get_template("report.html.jinja").render(page), encoding="utf-8")


@dataclass(frozen=True)
class Headline:
    """A number at the top of the page; `met` is None where it is no target."""

    title: str
    value: str
    explained: str
    target: str = ""
    met: bool | None = None


def _headlines(summary: Mapping[str, Any]) -> Iterator[Headline]:
    """The targets that have a number, and what the child saves."""
    for target, judged in zip(TARGETS, summary["targets"], strict=True):
        if judged["value"] is not None:
            shown, least = target.shown(judged["value"]), f"at least {target.shown(target.target)}"
            yield Headline(target.title, shown, target.name, least, judged["met"])
    parent, child = (summary["models"].get(role) for role in ("parent", "child"))
    if parent and child:
        for title, key, unit in SAVINGS:
            change = f"{100 * (child[key] / parent[key] - 1):+.0f} %".replace("-", "−")
            yield Headline(title, change, f"{child[key]:,} instead of {parent[key]:,}{unit}")


SAVINGS = (("Parameters", "parameters", ""), ("KV cache", "kv_bytes_per_token", " bytes a token"))


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
    """Of the longest stage's time, for the bar."""
    settings: dict[str, Any]
    libraries: dict[str, str]


def _stage_rows(store: Store, run: str) -> Iterator[StageRow]:
    found = [(document, store.stage_record(document["key"])) for document in stage_documents(store, run).values()]
    longest = max((record.seconds for _, record in found if record), default=0.0) or 1.0
    for document, record in found:
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


def _document(store: Store, run: str, role: str, name: str) -> dict[str, Any] | None:
    """A table of the run, where it has made one."""
    digest = artifacts(store, run).get(role)
    found: dict[str, Any] | None = None
    if digest is not None and name in store.manifest(digest).files:
        found = json.loads(store.read(digest, name))
    return found


def _margins(search: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Notes on the places of the child, by `LAYER/PART`."""
    return {f"{layer}/{part}": vars(note) for (layer, part), note in margin_notes(search).items()}


def _model_maps(store: Store, summary: Mapping[str, Any]) -> dict[str, BlockMap]:
    """The models of a run that did not search, those of one shape once."""
    maps: dict[Architecture, BlockMap] = {}
    for role, model in summary["models"].items():
        shape = Architecture.from_config(json.loads(store.read(model["digest"], "config.json")))
        maps.setdefault(shape, model_map(role, shape))
    return {found.title: found for found in maps.values()}


def _curves(store: Store, run: str) -> dict[str, Any]:
    """Curves by stage, without the times, which nothing draws."""
    found = {label: stage_curves(store, document["key"]) for label, document in stage_documents(store, run).items()}
    return {
        label: {metric: {"step": curve["step"], "value": curve["value"]} for metric, curve in curves.items()}
        for label, curves in found.items()
        if curves
    }


def _settings(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every setting by section; what stands on top is the recipe's own."""
    top = {key: value for key, value in recipe.items() if not isinstance(value, Mapping)}
    sections = {key: flatten(value) for key, value in recipe.items() if isinstance(value, Mapping)}
    return {"recipe": flatten(top), **sections}


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["duration"] = _duration
    return environment


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _json(value: object) -> Markup:
    """JSON that can stand inside a script element."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


@functools.cache
def _plotly() -> str:
    """The plotting library, packed: it would take most of the page's five megabytes as it is."""
    script = importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(script, mtime=0)).decode()
