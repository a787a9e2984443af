"""Search: how far is each shard, and how good are the blocks."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from components.core.base.metric_names import (
    ERROR,
    GPU_UTILIZATION,
    KL,
    PROGRESS_TIME,
    START_TIME,
    STEPS_DONE,
    STEPS_PLANNED,
)
from dashboards.layout import Panel, dashboard, of_stage

SEARCH = 'stage=~"search.*"'
SHARE_DONE = f"{of_stage(STEPS_DONE, SEARCH)} / {of_stage(STEPS_PLANNED, SEARCH)}"
STEPS_LEFT = f"({of_stage(STEPS_PLANNED, SEARCH)} - {of_stage(STEPS_DONE, SEARCH)})"
TIME_LEFT = f"{STEPS_LEFT} / (deriv({of_stage(STEPS_DONE, SEARCH)}[10m]) > 0)"


def build() -> Dashboard:
    """The dashboard."""
    first = [
        Panel("Shards at work", "none", {"shards": f"count({of_stage(START_TIME, SEARCH)})"}, "Pods now.", "number"),
        Panel(
            "Slowest shard",
            "percentunit",
            {"done": f"min({SHARE_DONE})"},
            "The next step waits for it.",
            "number",
        ),
        Panel(
            "Longest time without progress",
            "s",
            {"time": f"max(time() - {of_stage(PROGRESS_TIME, SEARCH)})"},
            "Half an hour: alert RunStalled.",
            "number",
            (600, 1800),
        ),
        Panel("Mean error of the blocks", "none", {"error": f"avg({of_stage(ERROR)})"}, "Normalised.", "number"),
    ]
    shards = [
        Panel(
            "Progress of each shard", "percentunit", {"{{run}} {{stage}} {{phase}}": SHARE_DONE}, "Steps done.", "bars"
        ),
        Panel(
            "Time left of each shard",
            "s",
            {"{{run}} {{stage}} {{phase}}": TIME_LEFT},
            "At the pace of the last ten minutes.",
        ),
        Panel("GPU use", "percentunit", {"{{stage}} GPU {{gpu}}": of_stage(GPU_UTILIZATION, SEARCH)}, "Of each shard."),
    ]
    scores = [
        Panel(
            "Error of the blocks", "none", {"{{run}} {{stage}}": of_stage(ERROR)}, "Mean over the layers of a shard."
        ),
        Panel(
            "KL of distilled candidates",
            "none",
            {"{{run}} {{stage}}": of_stage(KL, SEARCH)},
            "From the parent, nats; of the candidate that was distilled last.",
        ),
    ]
    about = "How far is each shard, and how good are the blocks?"
    return dashboard("Search", about, ["namespace", "run"], first, {"Shards": shards, "Scores": scores})
