"""The table of what models reached in tasks of lm-eval, for the page and for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from components.core.base.normal_distribution import Z_95
from pipelines.report.search_tables import Row, Table

MODE_NAMES = {"on": "thinking on", "off": "thinking off", "chat": "in a chat", "plain": "plain text"}

RowKey = tuple[str, str, str]
"""Name of the task, prompt mode, name of the metric."""


def task_table(models: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """A row for each metric of each task and prompt mode, a column for each model; None where no task was run.

    Args:
        models: models of a summary by role.
    """
    found = {role: dict(_cells(model["tasks"])) for role, model in models.items() if model["tasks"]}
    versions = {
        (task, mode): result["version"]
        for model in models.values()
        for task, modes in model["tasks"].items()
        for mode, result in modes.items()
    }
    keys = dict.fromkeys(key for cells in found.values() for key in cells)
    if not keys:
        return None
    rows = tuple(
        Row(_label(*key, versions[key[:2]]), tuple(cells.get(key, "–") for cells in found.values())) for key in keys
    )
    return Table("tasks-table", ("task", *found), rows)


def _cells(tasks: Mapping[str, Any]) -> Iterator[tuple[RowKey, str]]:
    """The metrics of one model as text."""
    for task, modes in tasks.items():
        for mode, result in modes.items():
            for metric, value in result["metrics"].items():
                error = result["standard_errors"].get(metric)
                yield (task, mode, metric), f"{value:.4g}" + (f" ±{Z_95 * error:.2g}" if error else "")


def _label(task: str, mode: str, metric: str, version: str | None) -> str:
    return f"{task}{f' {version}' if version else ''}, {metric}, {MODE_NAMES[mode]}"
