"""What all dashboards share: variables, links, and panels that are laid out in rows of 24 columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from grafana_foundation_sdk.builders import bargauge, stat, timeseries
from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models.common import BigValueColorMode, LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)

from components.core.base.metric_names import START_TIME, VLLM_RUNNING, Metric

PROMETHEUS = DataSourceRef("prometheus", "${datasource}")
LINKS = {"MLflow": "http://mlflow.example", "Kubeflow": "http://kubeflow.example", "Logs": "http://logs.example"}
"""The chart replaces these addresses by those of its values."""
STAT_WIDTH, STAT_HEIGHT, PANEL_WIDTH, PANEL_HEIGHT = 6, 4, 12, 8
TAG = "tessera"
VARIABLES = {
    "namespace": (START_TIME, "namespace", ""),
    "run": (START_TIME, "run", 'namespace=~"$namespace"'),
    "model": (VLLM_RUNNING, "model_name", 'namespace=~"$namespace"'),
}
"""By the name of a variable: whose label it chooses from, which label, and the selector of the series."""


@dataclass(frozen=True)
class Panel:
    """A panel.

    Attributes:
        title: of the panel.
        unit: of Grafana, such as `s`, `bytes`, `percentunit`.
        queries: in the language of Prometheus, by the legend.
        about: what the panel answers, and what to do about it.
        kind: one number, a bar for each series, or curves.
        thresholds: numbers from which the colour is orange, and red; below which, where the second is the smaller one.
    """

    title: str
    unit: str
    queries: Mapping[str, str]
    about: str
    kind: Literal["number", "bars", "curves"] = "curves"
    thresholds: tuple[float, float] | None = None


def of_stage(metric: Metric, matchers: str = "") -> str:
    """The series of a metric of stages that the variables choose."""
    return f'{metric}{{namespace=~"$namespace", run=~"$run"{", " * bool(matchers)}{matchers}}}'


def dashboard(
    title: str, about: str, variables: Sequence[str], first: Sequence[Panel], rows: Mapping[str, Sequence[Panel]]
) -> Dashboard:
    """A dashboard with numbers on top, and rows of panels below them.

    Args:
        title: of the dashboard; its id is made of it.
        about: the question that it answers.
        variables: names in `VARIABLES`.
        first: what a person on call asks first.
        rows: further panels by the title of their row.
    """
    made = Dashboard(f"Tessera: {title}").uid(f"tessera-{title.lower()}").description(about).tags([TAG])
    made = made.time("now-6h", "now").refresh("30s").timezone("browser").readonly()
    made = made.with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for name in variables:
        made = made.with_variable(_variable(name))
    for link in _links():
        made = made.link(link)
    for panel in first:
        made = made.with_panel(_built(panel))
    for row, panels in rows.items():
        made = made.with_row(Row(row))
        for panel in panels:
            made = made.with_panel(_built(panel))
    return made


def _variable(name: str) -> QueryVariable:
    metric, label, matchers = VARIABLES[name]
    made = QueryVariable(name).label(name).query(f"label_values({metric}{{{matchers}}}, {label})")
    made = made.datasource(PROMETHEUS).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    return made.sort(VariableSort.ALPHABETICAL_ASC).multi(True).include_all(True).all_value(".+")


def _links() -> list[DashboardLink]:
    """The other dashboards, and the addresses of `LINKS`."""
    others = DashboardLink("Dashboards").type(DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(True)
    outside = [
        DashboardLink(title).type(DashboardLinkType.LINK).url(url).icon("external link").target_blank(True)
        for title, url in LINKS.items()
    ]
    return [others.include_vars(True).keep_time(True), *outside]


def _built(panel: Panel) -> stat.Panel | bargauge.Panel | timeseries.Panel:
    """A panel as Grafana has it."""
    made: stat.Panel | bargauge.Panel | timeseries.Panel
    if panel.kind == "number":
        made = stat.Panel().height(STAT_HEIGHT).span(STAT_WIDTH).color_mode(BigValueColorMode.BACKGROUND)
    elif panel.kind == "bars":
        made = bargauge.Panel().height(PANEL_HEIGHT).span(PANEL_WIDTH)
    else:
        legend = VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM)
        legend = legend.display_mode(LegendDisplayMode.TABLE).calcs(["lastNotNull", "min", "max"])
        made = timeseries.Panel().height(PANEL_HEIGHT).span(PANEL_WIDTH).legend(legend)
    made = made.title(panel.title).unit(panel.unit).description(panel.about).datasource(PROMETHEUS)
    made = made.thresholds(_thresholds(panel.thresholds))
    if panel.unit == "percentunit":
        made = made.min(0).max(1)
    for number, (legend_format, expression) in enumerate(panel.queries.items()):
        query = Dataquery().expr(expression).legend_format(legend_format).ref_id(chr(ord("A") + number))
        made = made.with_target(query.instant() if panel.kind != "curves" else query.range())
    return made


def _thresholds(limits: tuple[float, float] | None) -> ThresholdsConfig:
    """Green, and orange and red from two limits on; the first is red where smaller numbers are worse."""
    if limits is None:
        steps = [Threshold(None, "blue")]
    elif limits[0] <= limits[1]:
        steps = [Threshold(None, "green"), Threshold(limits[0], "orange"), Threshold(limits[1], "red")]
    else:
        steps = [Threshold(None, "red"), Threshold(limits[1], "orange"), Threshold(limits[0], "green")]
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
