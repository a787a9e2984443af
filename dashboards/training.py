"""Training: does the model learn, and is the hardware busy. For pretraining, distillation and fine-tuning."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from components.core.base.metric_names import (
    COSINE,
    DATA_STALL,
    GPU_MEMORY,
    GPU_UTILIZATION,
    GRAD_NORM,
    KL,
    LEARNING_RATE,
    LOSS,
    MFU,
    PERPLEXITY,
    STEPS_DONE,
    TOKENS_PER_S,
)
from dashboards.layout import Panel, dashboard, of_stage

DISTILLATION = 'stage!~"rl.*|search.*"'


def build() -> Dashboard:
    """The dashboard."""
    loss, stage = of_stage(LOSS), "{{run}} {{stage}}"
    first = [
        Panel("Loss", "none", {stage: loss}, "Of the last step, nats a counted token.", "number"),
        Panel(
            "Losses that are not finite",
            "none",
            {"stages": f"count({loss}) - (count(abs({loss}) < Inf) or vector(0))"},
            "Not 0: the training is lost from here on; alert LossNotFinite.",
            "number",
            (0.5, 1),
        ),
        Panel(
            "Loss against an hour's median",
            "percentunit",
            {stage: f"{loss} / quantile_over_time(0.5, {loss}[1h])"},
            "Over 150 %: it has jumped; alert LossJumped.",
            "number",
            (1.2, 1.5),
        ),
        Panel("Tokens a second", "none", {stage: of_stage(TOKENS_PER_S)}, "Mean since the attempt began.", "number"),
    ]
    learning = [
        Panel("Loss", "none", {stage: loss}, "Nats a counted token."),
        Panel(
            "Perplexity on held-out text",
            "none",
            {"{{run}} {{phase}}": of_stage(PERPLEXITY)},
            "Of every model of the run, measured by the stage eval.",
        ),
        Panel(
            "Gradient norm", "none", {stage: of_stage(GRAD_NORM)}, "Before clipping; a jump comes before the loss's."
        ),
        Panel("Learning rate", "sci", {stage: of_stage(LEARNING_RATE)}, "By the schedule of the recipe."),
        Panel(
            "Distillation: KL and cosine distance",
            "none",
            {
                "{{run}} {{stage}} KL": of_stage(KL, DISTILLATION),
                "{{run}} {{stage}} cosine": of_stage(COSINE, DISTILLATION),
            },
            "The two terms of the loss of distillation.",
        ),
    ]
    speed = [
        Panel("Tokens a second", "none", {stage: of_stage(TOKENS_PER_S)}, "Mean since the attempt began."),
        Panel(
            "Steps a minute",
            "none",
            {stage: f"deriv({of_stage(STEPS_DONE)}[5m]) * 60"},
            "Falls where data or a rank stalls.",
        ),
        Panel(
            "Model FLOPs utilization",
            "percentunit",
            {stage: of_stage(MFU)},
            "What the model needs, of what its GPUs could do. No data: on CPUs, or the GPU's peak is not known.",
        ),
        Panel(
            "Data stall",
            "percentunit",
            {stage: of_stage(DATA_STALL)},
            "Share of a step that waits for its rows. Over a few percent: a faster disk, or more threads.",
        ),
        Panel(
            "GPU use",
            "percentunit",
            {f"{stage} GPU {{{{gpu}}}}": of_stage(GPU_UTILIZATION)},
            "Low: data or ranks stall.",
        ),
        Panel("GPU memory", "bytes", {f"{stage} GPU {{{{gpu}}}}": of_stage(GPU_MEMORY)}, "Memory in use."),
    ]
    about = "Does the model learn, and is the hardware busy?"
    return dashboard("Training", about, ["namespace", "run"], first, {"Learning": learning, "Speed": speed})
