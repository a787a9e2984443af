"""Plotly figures of the report; `report.css` colours text and grid lines, so that they follow the theme."""

import html
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.subplots import make_subplots

from pipelines.report.summary import MODES, SPLITS

BLUE, AMBER, GREEN, RED, GREY = "#4a6fdc", "#d08a26", "#1f9d6b", "#dc5349", "#8590a3"
"""Colours that can be told apart on a white and on a black page."""
CLEAR = "rgba(0,0,0,0)"
AXIS = {"automargin": True, "gridcolor": GREY, "zeroline": False, "title": {"standoff": 8, "font": {"size": 13}}}
TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, sans-serif", "size": 12},
        "margin": {"l": 12, "r": 12, "t": 12, "b": 12},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": AXIS,
        "yaxis": AXIS,
    }
)
FIRST_METRICS = ("reward", "accuracy", "format", "loss", "error")
"""Metrics that a curve shows first, in this order; a reader can choose the others."""


def figure_json(figure: go.Figure) -> Markup:
    """Figure as JSON for a script element; `<` is escaped, so that no text in it can end the element."""
    figure.update_layout(template=TEMPLATE)
    return Markup(figure.to_json(engine="json").replace("<", "\\u003c"))


def accuracy_figure(models: Mapping[str, Mapping[str, Any]]) -> go.Figure | None:
    """Accuracy of each model with its confidence interval; None where the run has no evaluation.

    Args:
        models: models of `summary.json` by role, in the order in which to show them.
    """
    roles = list(models)
    figure = make_subplots(1, len(SPLITS), shared_yaxes=True, horizontal_spacing=0.03)
    for (column, split), mode in itertools.product(enumerate(SPLITS, 1), MODES):
        evaluated = [role for role in roles if models[role]["accuracy"][split][mode] is not None]
        values = [100 * models[role]["accuracy"][split][mode] for role in evaluated]
        intervals = [models[role]["interval"][split][mode] for role in evaluated]
        bounds = [
            [100 * bound for bound in interval] if interval else [value, value]
            for interval, value in zip(intervals, values, strict=True)
        ]
        if not evaluated:
            continue
        trace = go.Scatter(
            mode="markers",
            name=f"thinking {mode}",
            legendgroup=mode,
            showlegend=column == 1,
            x=[roles.index(role) + (-0.11 if mode == "on" else 0.11) for role in evaluated],
            y=values,
            text=evaluated,
            marker={
                "size": 10,
                "color": BLUE if mode == "on" else AMBER,
                "symbol": "circle" if mode == "on" else "diamond",
            },
            error_y=error_bars(values, bounds),
            hovertemplate=f"%{{text}}, {split}, thinking {mode}: %{{y:.1f}} %<extra></extra>",
        )
        figure.add_trace(trace, 1, column)
        figure.update_xaxes(title_text=f"{split} problems", row=1, col=column)
    figure.update_xaxes(tickvals=[*range(len(roles))], ticktext=roles, range=[-0.5, len(roles) - 0.5], showgrid=False)
    figure.update_yaxes(range=[0, 104], ticksuffix=" %")
    return figure if figure.data else None


def error_bars(values: Sequence[float], bounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Vertical bars from the lower to the upper bound of each value."""
    return {
        "type": "data",
        "symmetric": False,
        "thickness": 1.5,
        "width": 4,
        "array": [high - value for value, (_, high) in zip(values, bounds, strict=True)],
        "arrayminus": [value - low for value, (low, _) in zip(values, bounds, strict=True)],
    }


def curve_figure(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> go.Figure:
    """Metrics of one stage over its steps, one visible at a time and chosen from a menu; long ones with a running mean.

    Args:
        curves: `step` and `value` by metric, at least one.
    """
    figure, metrics = go.Figure(), sorted(curves, key=_metric_order)
    for metric in metrics:
        step, value = curves[metric]["step"], curves[metric]["value"]
        trace = {"x": step, "mode": "lines", "name": html.escape(metric), "visible": metric == metrics[0]}
        is_long = len(value) > 30
        line = {"color": BLUE, "width": 1 if is_long else 2}
        hover = "step %{x}: %{y:.4g}<extra></extra>"
        figure.add_scatter(**trace, y=value, line=line, opacity=0.35 if is_long else 1, hovertemplate=hover)
        if is_long:
            mean = [float(f"{each:.6g}") for each in _running_mean(value)]
            figure.add_scatter(**trace, y=mean, line={"color": BLUE, "width": 2.2}, hoverinfo="skip")
    owners = [trace.name for trace in figure.data]
    buttons = [
        {
            "label": name.replace("_", " "),
            "method": "restyle",
            "args": ["visible", [owner == name for owner in owners]],
        }
        for name in dict.fromkeys(owners)
    ]
    place = {"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "pad": {"r": 0, "t": 0}}
    menu = {"buttons": buttons, **place, "bgcolor": CLEAR, "bordercolor": GREY}
    figure.update_layout(updatemenus=[menu], showlegend=False, margin={"t": 36})
    figure.update_xaxes(title_text="step")
    return figure


def _metric_order(metric: str) -> int:
    name = metric.rpartition("/")[2]
    return FIRST_METRICS.index(name) if name in FIRST_METRICS else len(FIRST_METRICS)


def _running_mean(values: Sequence[float]) -> Iterator[float]:
    """Mean over a window around each value, narrower towards both ends."""
    half = math.ceil(len(values) / 40)
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        yield statistics.fmean(values[i - reach : i + reach + 1])
