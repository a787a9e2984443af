"""Plotly figures of a search: Pareto front, replace-1-block scores, measured costs, FFN dependency."""

import html
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipelines.report.figures import AMBER, BLUE, GREEN, GREY, RED, error_bars
from pipelines.report.search_tables import SlotId, SlotNote

HEATMAP = {
    "colorscale": [[0, "rgba(208,138,38,0.07)"], [0.5, "rgba(208,138,38,0.8)"], [1, "rgba(214,58,48,1)"]],
    "xgap": 2,
    "ygap": 2,
    "hoverongaps": False,
    "colorbar": {"thickness": 10, "outlinewidth": 0},
}
"""Look of a heat map; the low end of its colour scale is the page itself, light or dark."""


def pareto_figure(search: Mapping[str, Any]) -> go.Figure:
    """Score of the child, the baselines and the Pareto front over decode time, throughput and memory.

    Args:
        search: `search.json`.
    """
    figure = make_subplots(1, 3, shared_yaxes=True, horizontal_spacing=0.03)
    points = {
        "parent": ({"costs": search["parent"], "score": 0.0}, GREY, "square", 11),
        "random choice": (search["random_child"], RED, "x", 11),
        "greedy choice": (search["greedy_child"], AMBER, "diamond", 12),
        **{
            name: (choice, GREY, "hexagon" if name == "uniform" else "triangle-up", 12)
            for name, choice in search.get("baselines", {}).items()
        },
        "chosen child": (search["child"], GREEN, "star", 17),
    }
    for column, (resource, title, value) in enumerate(_pareto_axes(search), 1):
        fronts = {"latency_ms": search["pareto"], **search.get("fronts", {})}
        front = fronts.get(resource, search["pareto"])
        limits = [f"within {resource} {point.get('limit_ms', point.get('limit')):.6g}<br>" for point in front]
        trace = go.Scatter(
            mode="lines+markers",
            name="Pareto front",
            legendgroup="Pareto front",
            showlegend=column == 1,
            x=[value(point["costs"]) for point in front],
            y=[point["score"] for point in front],
            text=[limit + _point_text(search, point) for limit, point in zip(limits, front, strict=True)],
            line={"color": BLUE, "width": 2},
            marker={"size": 6},
            hovertemplate="%{text}<extra></extra>",
        )
        figure.add_trace(trace, 1, column)
        for name, (point, colour, symbol, size) in points.items():
            marker = go.Scatter(
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                x=[value(point["costs"])],
                y=[point["score"]],
                text=[_point_text(search, point)],
                marker={"color": colour, "symbol": symbol, "size": size},
                cliponaxis=False,
                hovertemplate=f"<b>{html.escape(name)}</b><br>%{{text}}<extra></extra>",
            )
            figure.add_trace(marker, 1, column)
        figure.update_xaxes(title_text=title, row=1, col=column)
        limit = search["limits"].get(resource)
        if limit:
            line = {"dash": "dot", "color": GREY, "width": 1.5}
            position = "top right" if column == 2 else "top left"
            figure.add_vline(
                value({resource: limit}),
                line=line,
                annotation={"text": "limit"},
                annotation_position=position,
                col=column,
            )
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="sum of replace-1-block KL, nats a token", row=1, col=1)
    return figure


def _pareto_axes(search: Mapping[str, Any]) -> Iterator[tuple[str, str, Callable[[Mapping[str, float]], float | None]]]:
    """Resource, title and value of each horizontal axis; a time that is not positive has no throughput."""
    tokens = search.get("batch_tokens") if search["parent"].get("request_ms") else None
    time = "request_ms" if tokens else "latency_ms"
    yield "latency_ms", "predicted time of a decode step, ms", lambda costs: costs["latency_ms"]
    yield (
        time,
        "predicted tokens a second of the batch" if tokens else "predicted decode steps a second",
        lambda costs: 1000 * (tokens or 1) / costs[time] if costs[time] > 0 else None,
    )
    if search["parent"].get("memory_bytes"):
        yield "memory_bytes", "predicted memory, MiB", lambda costs: costs["memory_bytes"] / 2**20
    else:
        yield "parameters", "parameters", lambda costs: costs["parameters"]


def _point_text(search: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """Score, costs and number of sub-blocks of a choice, for a hover label."""
    costs, lines = point["costs"], [f"score {point['score']:.4f}"]
    times = f"{costs['latency_ms']:.2f} ms a decode step"
    if costs.get("time_to_first_token_ms"):
        times += f", {costs['time_to_first_token_ms']:.1f} ms to the first token"
    if costs.get("request_ms") and search.get("batch_tokens"):
        times += f", {1000 * search['batch_tokens'] / costs['request_ms']:,.0f} tokens a second"
    sizes = f"{costs['parameters']:,.0f} parameters, {costs['kv_bytes_per_token']:,.0f} KV bytes a token"
    if costs.get("memory_bytes"):
        sizes += f", {costs['memory_bytes'] / 2**20:.1f} MiB"
    lines += [times, sizes]
    if "choice" in point:
        chosen = [
            (slot["part"], slot["options"][i]["size"]) for slot, i in zip(search["slots"], point["choice"], strict=True)
        ]
        attention, ffn = (sum(part == wanted and size != 0 for part, size in chosen) for wanted in ("attention", "ffn"))
        lines.append(f"attention in {attention}, FFN in {ffn} of {len(chosen) // 2} layers")
    return "<br>".join(lines)


def scores_figure(search: Mapping[str, Any], notes: Mapping[SlotId, SlotNote]) -> go.Figure:
    """Replace-1-block score of every option of every layer; dots are the child's, hollow where noise could change them.

    Args:
        search: `search.json`.
        notes: margins of the child's choices.
    """
    scores = {
        (slot["layer"], slot["part"], option["size"]): option["score"]
        for slot in search["slots"]
        for option in slot["options"][1:]
    }
    errors = {
        (block["layer"], block["part"], block["size"]): error
        for block in search["blocks"]
        for measure, error in block["errors"].items()
        if error and block[measure] == scores.get((block["layer"], block["part"], block["size"]))
    }
    layers = list(dict.fromkeys(slot["layer"] for slot in search["slots"]))
    rows = sorted({(part, size) for _, part, size in scores}, key=lambda row: (row[0], _width(row[1])))

    def hover_text(layer: int, part: str, size: int | str) -> str:
        error, note = errors.get((layer, part, size)), notes.get((layer, part))
        text = f" ± {error:#.2g}" if error else ""
        return text + (f"<br>{html.escape(note.text)}" if note else "")

    heat = go.Heatmap(
        x=layers,
        y=[_option_name(part, size) for part, size in rows],
        z=[[scores.get((layer, *row)) for layer in layers] for row in rows],
        text=[[hover_text(layer, *row) for layer in layers] for row in rows],
        **HEATMAP,
        hovertemplate="layer %{x}, %{y}: %{z:.4f}%{text}<extra></extra>",
    )
    chosen = [
        (slot["layer"], slot["part"], slot["options"][option]["size"])
        for slot, option in zip(search["slots"], search["child"]["choice"], strict=True)
        if option > 0
    ]
    noisy = {slot for slot, note in notes.items() if note.within_noise}
    dots = go.Scatter(
        mode="markers",
        x=[layer for layer, _, _ in chosen],
        y=[_option_name(part, size) for _, part, size in chosen],
        marker={
            "color": BLUE,
            "size": 9,
            "line": {"width": 2},
            "symbol": ["circle-open" if (layer, part) in noisy else "circle" for layer, part, _ in chosen],
        },
        hoverinfo="skip",
        showlegend=False,
    )
    figure = go.Figure([heat, dots])
    figure.update_xaxes(title_text="layer of the parent", showgrid=False, dtick=4 if len(layers) > 24 else 1)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return figure


def _width(size: int | str) -> float:
    """Sort key that puts the largest size first, and a linear replacement just before none."""
    return -0.5 if isinstance(size, str) else -size


def _option_name(part: str, size: int | str) -> str:
    name = "FFN" if part == "ffn" else part
    if isinstance(size, str):
        return f"linear {name}"
    unit = "channels" if part == "ffn" else "KV head" if size == 1 else "KV heads"
    return f"{size} {unit}" if size else f"no {name}"


def costs_figure(costs: Mapping[str, Any]) -> go.Figure | None:
    """Measured over predicted decode time of the models that were timed; None where none was.

    Args:
        costs: `costs.json`.
    """
    models = costs["models"]
    if not models:
        return None
    predicted, measured = [model["explained_ms"] for model in models], [model["median_ms"] for model in models]
    ends = [0.92 * min(measured), 1.06 * max(measured)]
    diagonal = go.Scatter(
        mode="lines",
        x=ends,
        y=ends,
        line={"color": GREY, "dash": "dot", "width": 1.5},
        hoverinfo="skip",
        showlegend=False,
    )
    points = go.Scatter(
        mode="markers",
        x=predicted,
        y=measured,
        marker={"size": 9, "color": BLUE},
        error_y=error_bars(measured, [(min(model["step_ms"]), max(model["step_ms"])) for model in models]),
        text=[
            f"KV heads {_run_lengths(m['num_key_value_heads'])}<br>FFN channels {_run_lengths(m['intermediate_size'])}"
            for m in models
        ],
        customdata=[100 * (sum_ms / median - 1) for sum_ms, median in zip(predicted, measured, strict=True)],
        hovertemplate="%{text}<br>predicted %{x:.3f} ms, measured %{y:.3f} ms (%{customdata:+.1f} %)<extra></extra>",
        showlegend=False,
    )
    figure = go.Figure([diagonal, points])
    figure.update_xaxes(title_text="predicted time of a decode step, ms")
    figure.update_yaxes(title_text="measured, ms")
    return figure


def _run_lengths(sizes: Sequence[int | str]) -> str:
    """Sizes of successive layers, such as `512 × 3, 0 × 9`."""
    return ", ".join(f"{size} × {len(list(group))}" for size, group in itertools.groupby(sizes))


def fusion_figures(fusion: Mapping[str, Any] | None) -> Iterator[go.Figure]:
    """Dependency of the FFNs of each run on those before them; boxes are the groups that became one FFN.

    Args:
        fusion: of `search.json`.
    """
    for run in (fusion or {}).get("runs", ()):
        names = [str(layer) for layer in run["layers"]]
        if len(names) < 2:
            continue
        matrix = [
            [v if column > row else None for column, v in enumerate(vs)] for row, vs in enumerate(run["dependency"])
        ]
        largest = max((value for row in matrix for value in row if value is not None), default=0.0)
        heat = go.Heatmap(
            x=names,
            y=names,
            z=matrix,
            zmin=0,
            zmax=largest or 1,
            **HEATMAP,
            hovertemplate="FFN %{x} without FFN %{y}: %{z:.4f}<extra></extra>",
        )
        figure = go.Figure(heat)
        for group in run["groups"]:
            low, high = run["layers"].index(group[0]) - 0.5, run["layers"].index(group[-1]) + 0.5
            figure.add_shape(type="rect", x0=low, x1=high, y0=low, y1=high, line={"color": BLUE, "width": 2})
        figure.update_xaxes(title_text="layer of the FFN", type="category", showgrid=False)
        figure.update_yaxes(title_text="removed before it", type="category", autorange="reversed", showgrid=False)
        yield figure
