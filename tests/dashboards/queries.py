"""The queries of the dashboards, read from the files of the chart."""

import json
import re
from typing import NamedTuple

from components.core.base.metric_names import KUEUE, OPERATOR, REPORTED, ROLLOUTS, RUNTIME, VLLM
from dashboards.budgets import SINCE, STEP
from infra.chart import CHART

FILES = sorted((CHART / "dashboards").glob("*.json"))
METRICS = (*REPORTED, *RUNTIME, *OPERATOR, *VLLM, *KUEUE, *ROLLOUTS)
DECLARED = {metric.name for metric in METRICS}
NAME = re.compile(r"\b(?:tessera_|vllm:|kueue_|http_requests|rollout_)\w+")
VARIABLES = {"$__rate_interval": "1m", "$__range:1m": "1h:1s", "$namespace": ".+", "$run": ".+", "$model": ".+"}
VARIABLES |= {f"{SINCE}:{STEP}": "1h:1s"}
"""What Grafana would put in; ranges in steps of a second, since a test takes no minute."""


class Query(NamedTuple):
    """A query of a panel."""

    dashboard: str
    panel: str
    legend: str
    expression: str


def all_queries() -> list[Query]:
    """Every query of every panel."""
    return [
        Query(path.stem, panel["title"], target["legendFormat"], target["expr"])
        for path in FILES
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
    ]


def with_values(expression: str) -> str:
    """A query as Grafana would send it."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def metrics_of(expression: str) -> set[str]:
    """Names of the metrics in a query; those of histograms without their suffix."""
    found = set(NAME.findall(re.sub(r'"[^"]*"', "", expression)))
    return {name if name in DECLARED else re.sub(r"_(bucket|sum|count)$", "", name) for name in found}
