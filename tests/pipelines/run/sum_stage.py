"""A stage that adds up what others made."""

import json
from pathlib import Path

from pydantic import JsonValue

from components.core.runtime.context import StageContext
from components.core.runtime.stage import Input, Output, Stage
from tests.components.core.fake_stage import FakeConfig

STAGE = Stage(
    name="sum",
    config=FakeConfig,
    inputs={
        "total": Input("table", "a total.json"),
        "others": Input("table", "further totals", optional=True, many=True),
    },
    outputs={"sum": Output("table", "total.json")},
    entry="tests.pipelines.run.sum_stage:run",
    doc="Add totals up.",
    source="none",
)


def run(
    config: FakeConfig, *, context: StageContext, out: Path, total: Path, others: list[Path] | None = None
) -> dict[str, JsonValue]:
    """The sum of all totals, times the factor."""
    numbers = [int((folder / "total.json").read_text()) for folder in (total, *(others or []))]
    result = config.factor * sum(numbers)
    (out / "sum" / "total.json").write_text(json.dumps(result))
    return {"sum": result}
