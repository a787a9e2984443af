"""What models reached in tasks of lm-eval, as a table."""

from typing import Any

from pipelines.report.search_tables import Row
from pipelines.report.task_table import task_table


def result(value: float, error: float | None = None, version: str | None = "3.0") -> dict[str, Any]:
    errors = {} if error is None else {"exact_match/strict": error}
    return {"metrics": {"exact_match/strict": value}, "standard_errors": errors, "problems": 9, "version": version}


def test_a_row_for_each_metric_and_mode_and_a_column_for_each_model_that_ran_tasks() -> None:
    models: dict[str, dict[str, Any]] = {
        "parent": {"tasks": {"gsm8k": {"plain": result(0.25, 0.05)}}},
        "child": {"tasks": {}},
        "rl": {
            "tasks": {"gsm8k": {"on": result(0.5, 0.01), "off": result(0.125)}, "own": {"on": result(1, 0.0, None)}}
        },
    }
    found = task_table(models)
    assert found is not None
    assert found.columns == ("task", "parent", "rl")
    assert found.rows == (
        Row("gsm8k 3.0, exact_match/strict, plain text", ("0.25 ±0.098", "–")),
        Row("gsm8k 3.0, exact_match/strict, thinking on", ("–", "0.5 ±0.02")),
        Row("gsm8k 3.0, exact_match/strict, thinking off", ("–", "0.125")),
        Row("own, exact_match/strict, thinking on", ("–", "1")),
    )


def test_without_tasks_there_is_no_table() -> None:
    assert task_table({"parent": {"tasks": {}}}) is None
