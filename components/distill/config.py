"""Settings, inputs and outputs of distillation."""

from components.core.runtime.stage import Input, Output, Stage
from components.core.training.train_config import TrainConfig


class DistillConfig(TrainConfig):
    """Knowledge distillation of a searched child from its parent."""


STAGE = Stage(
    name="distill",
    config=DistillConfig,
    inputs={
        "teacher": Input("model", "the dense parent"),
        "student": Input("model", "the searched child"),
        "corpus": Input("data", "train.jsonl with rows {text} or {prompt, completion}"),
    },
    outputs={"distilled": Output("model", "the child after distillation")},
    entry="components.distill.stage:run",
    doc="Teach the child its parent's distributions and hidden states: cosine + KL, no language-model loss.",
    source="arXiv 2411.19146, section 4.3",
)
