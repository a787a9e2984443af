"""What distillation needs, takes and makes."""

from pydantic import Field

from components.core.runtime.stage import Input, Output, Stage
from components.core.training.train_config import TrainConfig


class DistillConfig(TrainConfig):
    """Knowledge distillation of a searched child from its parent."""

    cosine_weight: float = Field(default=1.0, ge=0)
    """Weight of the hidden-state cosine term; the paper's sum is unweighted."""
    kl_weight: float = Field(default=1.0, ge=0)
    """Weight of KL(teacher || student) on the next-token distributions."""


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
