"""Run: is it alive, how far is it, when will it end, what does it cost."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from components.core.base.metric_names import (
    CHECKPOINT_TIME,
    GPU_MEMORY,
    GPU_UTILIZATION,
    PROGRESS_TIME,
    START_TIME,
    STEPS_DONE,
    STEPS_PLANNED,
    STORE_TIME,
)
from dashboards.layout import Panel, dashboard, of_stage

TIME_LEFT = f"({of_stage(STEPS_PLANNED)} - {of_stage(STEPS_DONE)}) / (deriv({of_stage(STEPS_DONE)}[10m]) > 0)"
SINCE_PROGRESS = f"time() - ({of_stage(PROGRESS_TIME)} or {of_stage(START_TIME)})"
GPU_HOURS = f"sum_over_time((count by (run) ({of_stage(GPU_UTILIZATION)}))[$__range:1m]) / 60"
"""One sample a minute: the number of GPUs that stages of the run have then."""


def build() -> Dashboard:
    """The dashboard."""
    first = [
        Panel(
            "Stages at work",
            "none",
            {"stages": f"count({of_stage(START_TIME)})"},
            "Stages whose pods Prometheus reads now. No data: no stage works; Kubeflow says why.",
            "number",
        ),
        Panel(
            "Longest time without progress",
            "s",
            {"time": f"max({SINCE_PROGRESS})"},
            "Half an hour without a step is a stalled stage: alert RunStalled.",
            "number",
            (600, 1800),
        ),
        Panel(
            "Oldest checkpoint",
            "s",
            {"age": f"max(time() - {of_stage(CHECKPOINT_TIME)})"},
            "What a crash now would cost. No data: no stage has saved one yet.",
            "number",
            (900, 3600),
        ),
        Panel(
            "GPU hours in this range",
            "h",
            {"hours": f"sum({GPU_HOURS})"},
            "Hours in which a stage had a GPU, busy or not.",
            "number",
        ),
    ]
    stages = [
        Panel(
            "Progress of each stage",
            "percentunit",
            {"{{stage}} {{phase}}": f"{of_stage(STEPS_DONE)} / {of_stage(STEPS_PLANNED)}"},
            "Steps of the phase that are done.",
            "bars",
        ),
        Panel(
            "Time left of each stage",
            "s",
            {"{{stage}} {{phase}}": TIME_LEFT},
            "Of the phase, at the pace of the last ten minutes.",
        ),
        Panel(
            "Time without progress",
            "s",
            {"{{stage}}": SINCE_PROGRESS},
            "A saw blade is good; a line that climbs is a stage that waits.",
        ),
        Panel(
            "Age of the checkpoint",
            "s",
            {"{{stage}}": f"time() - {of_stage(CHECKPOINT_TIME)}"},
            "Climbs where checkpoints fail: the store is full or does not answer.",
        ),
    ]
    machine = [
        Panel(
            "GPU use",
            "percentunit",
            {"{{stage}} GPU {{gpu}}": of_stage(GPU_UTILIZATION)},
            "Fraction of the time in which a kernel ran. Of a stage of several nodes: the first node's.",
        ),
        Panel("GPU memory", "bytes", {"{{stage}} GPU {{gpu}}": of_stage(GPU_MEMORY)}, "Memory in use."),
        Panel(
            "Events that are not in the store",
            "s",
            {"{{stage}}": f"time() - {of_stage(STORE_TIME)}"},
            "Seconds since the store had all of them; climbs where the store does not answer.",
        ),
        Panel(
            "Time at work",
            "s",
            {"{{stage}}": f"time() - {of_stage(START_TIME)}"},
            "Since this attempt began. A fall is a restart.",
        ),
    ]
    about = "Is the run alive, how far is it, when will it end, and what does it cost?"
    return dashboard("Run", about, ["namespace", "run"], first, {"Stages": stages, "Machine": machine})
