"""Result of a run: its models, baselines, stages and targets, as `summary.json` and as tables for the terminal."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.core.model.architecture import Architecture
from components.core.store.store import Store
from pipelines.recipe.llama_nemotron import BASELINES, MODELS
from pipelines.records.runs import artifacts, read_table, run_record, stage_documents
from pipelines.report.task_table import task_table

ROW_ORDER = (MODELS[0], *BASELINES, *MODELS[1:])
"""Models in the order of the pipeline; baselines stand before the child."""
SPLITS = ("standard", "hard")
MODES = ("on", "off")
"""Thinking on and off; a base model has a single mode, recorded as `on`."""

Models = Mapping[str, Mapping[str, Any]]

Unit = Literal["count", "number", "times", "share", "points"]
"""A whole number, any number, a ratio, a share of the whole, or a difference of two shares."""


@dataclass(frozen=True)
class Target:
    """A number by which a run is judged.

    Attributes:
        key: where the recipe has the smallest value that is good enough, in `targets`.
        title: two or three words.
        name: what is compared, in words.
        unit: of the number.
        value: computes the number from the models; None where it was not measured.
        gain: finds the paired comparison behind the number, where there is one, in the models.
    """

    key: str
    title: str
    name: str
    unit: Unit
    value: Callable[[Models], float | None]
    gain: Callable[[Models], Mapping[str, Any] | None] = lambda _: None

    def format(self, value: float) -> str:
        """Format a value with the unit of the target."""
        return format_value(value, self.unit)

    def interval(self, models: Models) -> tuple[float, float] | None:
        """95 % confidence interval of the number; None where it is not of a paired comparison."""
        gain = self.gain(models)
        if gain is None:
            return None
        low, high = ("ratio_low", "ratio_high") if self.unit == "share" else ("low", "high")
        return gain[low], gain[high]

    def format_interval(self, interval: Sequence[float]) -> str:
        """Format an interval in words, without the unit."""
        low, high = (f"{100 * bound:{'+' if self.unit == 'points' else ''}.1f}" for bound in interval)
        return f"95 % interval {low} to {high}"


def format_value(value: float, unit: Unit) -> str:
    """Format a number with its unit."""
    formats = {
        "count": "{:,.0f}",
        "number": "{:,.4g}",
        "times": "{:.2f}×",
        "share": "{:.1f} %",
        "points": "{:+.1f} points",
    }
    return formats[unit].format(100 * value if unit in ("share", "points") else value)


def format_duration(seconds: float | None) -> str:
    """Format a time in seconds, from a minute on in minutes and seconds."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def build_summary(store: Store, run: str) -> dict[str, Any]:
    """Build the `summary.json` of a run; numbers that were not measured are None."""
    record, roles = run_record(store, run), artifacts(store, run)
    targets = record["recipe"].get("targets") or {}
    measured = (read_table(store, run, "metrics", "metrics.json") or {"models": {}})["models"]

    def described(role: str) -> dict[str, Any]:
        return _describe(store, roles[role], measured.get(role, {}))

    models = {role: described(role) for role in MODELS if role in roles}
    return {
        "run": record["run"],
        "seconds": record["seconds"],
        "models": models,
        "baselines": {role: described(role) for role in BASELINES if role in roles},
        "stages": _stages(stage_documents(store, run)),
        "targets": [_judge(target, models, targets.get(target.key)) for target in TARGETS],
    }


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the models, their tasks, the targets and the stages of a summary."""
    console.print(_models_table(summary, wide=console.width >= WIDE))
    if tasks := task_table(summary["models"]):
        shown = _table(*tasks.columns, gap=console.width >= WIDE)
        for row in tasks.rows:
            shown.add_row(row.label, *row.cells)
        console.print(shown)
    if any(target["value"] is not None for target in summary["targets"]):
        console.print(_targets_table(summary["targets"]))
    console.print(_stages_line(summary))


def _describe(store: Store, digest: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a model from its configuration, and its measurements."""
    shape = Architecture.from_config(json.loads(store.read(digest, "config.json")))
    return {
        "digest": digest,
        "parameters": shape.parameters,
        "disk_bytes": sum(file.size for file in store.manifest(digest).files.values()),
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "tokens_per_second": measured.get("tokens_per_second"),
        "tokens_per_second_interval": measured.get("tokens_per_second_interval"),
        "perplexity": measured.get("perplexity"),
        "accuracy": _by_split(measured.get("accuracy")),
        "interval": _by_split(measured.get("interval")),
        "format": _by_mode(measured.get("format")),
        "gains": measured.get("gains"),
        "tasks": measured.get("tasks") or {},
    }


def _by_split(values: Mapping[str, Any] | None) -> dict[str, Any]:
    return {split: _by_mode((values or {}).get(split)) for split in SPLITS}


def _by_mode(values: Mapping[str, Any] | None) -> dict[str, Any]:
    return {mode: (values or {}).get(mode) for mode in MODES}


def _stages(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stages by label; the tasks of the search count as one."""
    stages: dict[str, dict[str, Any]] = {}
    for label, document in documents.items():
        part_of = label.partition("/")[0]
        stage = stages.setdefault(part_of, {"seconds": 0.0, "cached": True, "key": None})
        stage["seconds"] += document["seconds"]
        stage["cached"] = stage["cached"] and document["cached"]
        if label == part_of:
            stage["key"] = document["key"]
    return stages


# Targets


def _entry(models: Models, *path: str) -> Any:
    """What is at a path of keys; None where a key is missing."""
    value: Any = models
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _find(models: Models, *path: str) -> float | None:
    """Number at a path of keys; None where a key is missing."""
    value = _entry(models, *path)
    return None if value is None else float(value)


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _gain(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base


def _lower(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None


def _format(models: Models, role: str) -> float | None:
    return _lower(*(_find(models, role, "format", mode) for mode in MODES))


def _split(models: Models, role: str) -> str:
    """The hard problems, or all where none is hard, as with those of most users."""
    return "standard" if _find(models, role, "accuracy", "hard", "on") is None else "hard"


def _accuracy(models: Models, role: str, mode: str) -> float | None:
    """Accuracy on these problems in a mode."""
    return _find(models, role, "accuracy", _split(models, role), mode)


def _speed_up(models: Models) -> float | None:
    return _ratio(_find(models, "child", "tokens_per_second"), _find(models, "parent", "tokens_per_second"))


def _accuracy_retained(models: Models) -> float | None:
    distilled, parent = (_find(models, role, "accuracy", "standard", "on") for role in ("distilled", "parent"))
    return _ratio(distilled, parent)


def _thinking_gain(models: Models) -> float | None:
    return _gain(_accuracy(models, "sft", "on"), _accuracy(models, "sft", "off"))


def _rl_gain(models: Models) -> float | None:
    return _gain(_accuracy(models, "rl", "on"), _accuracy(models, "sft", "on"))


TARGETS = (
    Target("speed_up", "Speed-up", "tokens per second, child over parent", "times", _speed_up),
    Target(
        "accuracy_retained",
        "Accuracy retained",
        "accuracy, distilled child over parent",
        "share",
        _accuracy_retained,
        lambda models: _entry(models, "distilled", "gains", "over", "parent", "standard", "on"),
    ),
    Target(
        "format_after_sft",
        "Format after SFT",
        "valid format after SFT, lower of both modes",
        "share",
        lambda models: _format(models, "sft"),
    ),
    Target(
        "thinking_gain",
        "Thinking gain",
        "thinking on minus off after SFT, on hard problems if there are any",
        "points",
        _thinking_gain,
        lambda models: _entry(models, "sft", "gains", "thinking", _split(models, "sft")),
    ),
    Target(
        "rl_gain",
        "RL gain",
        "RL minus SFT with thinking on, on hard problems if there are any",
        "points",
        _rl_gain,
        lambda models: _entry(models, "rl", "gains", "over", "sft", _split(models, "rl"), "on"),
    ),
    Target(
        "format_after_rl",
        "Format after RL",
        "valid format after RL, lower of both modes",
        "share",
        lambda models: _format(models, "rl"),
    ),
)


def _judge(target: Target, models: Models, least: float | None) -> dict[str, Any]:
    """Compare a number with the least that the recipe wants; a difference of exactly that meets it, so it is rounded.

    The number decides; its interval shows how sure that is.
    """
    value = target.value(models)
    met = None if value is None or least is None else round(value, 9) >= least
    interval = None if value is None else target.interval(models)
    return {"name": target.name, "target": least, "value": value, "interval": interval, "met": met}


# Tables


def _models_table(summary: Mapping[str, Any], *, wide: bool) -> Table:
    table = _table("model", title=f"run {summary['run']}", gap=wide)
    shares = ("standard\non, %", "\noff, %", "hard\non, %", "\noff, %", "format\non, %", "\noff, %")
    perplexity = ("perplex-\nity",) if wide else ()
    for heading in ("weights", "KV B\n/token", "tokens\n/s", *perplexity, *shares):
        table.add_column(heading, justify="right", no_wrap=True)
    models = {**summary["models"], **summary["baselines"]}
    for role in ROW_ORDER:
        if role in models:
            cells = _model_cells(models[role], wide=wide)
            table.add_row(role, *cells, style="dim" if role in BASELINES else None)
    return table


WIDE = 100
"""Terminal width, in characters, from which tables show perplexity and confidence intervals."""


def _model_cells(model: Mapping[str, Any], *, wide: bool) -> Iterator[str]:
    yield f"{model['parameters'] / 1e6:,.2f} M"
    yield f"{model['kv_bytes_per_token']:,}"
    yield "–" if model["tokens_per_second"] is None else f"{model['tokens_per_second']:,.0f}"
    if wide:
        yield "–" if model["perplexity"] is None else f"{model['perplexity']:.4g}"
    for split in SPLITS:
        for mode in MODES:
            interval = model["interval"][split][mode] if wide else None
            yield _with_interval(model["accuracy"][split][mode], interval)
    for mode in MODES:
        yield percent(model["format"][mode])


def _table(*columns: str, title: str | None = None, gap: bool = True) -> Table:
    padding = (0, int(gap), 0, 0)
    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, padding=padding, pad_edge=False)


def _targets_table(targets: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("target", "at least", "reached", "")
    verdict = {True: Text("met", "green"), False: Text("missed", "red"), None: Text("")}
    for target, judged in zip(TARGETS, targets, strict=True):
        if judged["value"] is None and judged["target"] is None:
            continue
        reached = "–" if judged["value"] is None else target.format(judged["value"])
        if judged["interval"] is not None:
            reached += f"\n{target.format_interval(judged['interval'])}"
        least = "–" if judged["target"] is None else target.format(judged["target"])
        shown = Text("not measured", "dim") if judged["value"] is None else verdict[judged["met"]]
        table.add_row(target.name, least, reached, shown)
    return table


def _stages_line(summary: Mapping[str, Any]) -> Text:
    times = [
        f"{label} {'cached' if stage['cached'] else format_duration(stage['seconds'])}"
        for label, stage in summary["stages"].items()
    ]
    total = "" if summary["seconds"] is None else f"{format_duration(summary['seconds'])} in all: "
    return Text(total + ", ".join(times), style="dim")


def percent(value: float | None) -> str:
    """Format a share in percent, without the sign."""
    return "–" if value is None else f"{100 * value:.1f}"


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    """Format a share, with half the width of its interval where that is known."""
    if value is None or interval is None:
        return percent(value)
    return f"{100 * value:.1f} ±{50 * (interval[1] - interval[0]):.1f}"
