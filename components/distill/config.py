"""Settings, inputs and outputs of distillation."""

from pydantic import Field

from components.core.runtime.stage import Input, Output, Stage
from components.core.training.train_config import HiddenStateLoss, TrainConfig


class DistillConfig(TrainConfig):
    """Knowledge distillation of a searched child from its parent."""

    hidden_state_loss: HiddenStateLoss | None = "cosine"
    """How hidden states are compared after each layer that has the same parent layers behind it: `cosine` distance,
    added to the KL (the paper); `mse`, the squared difference after the parent's next norm, weighted in each micro
    batch to be as large as the KL (Minitron, arXiv 2407.14679, section 3); null: not at all, which takes less
    memory."""
    top_k_logits: int | None = Field(default=None, gt=0)
    """The KL is over so many tokens that the teacher finds most likely at each position, and all others as one; null:
    over all tokens. Without the share of the others the student would be too confident (arXiv 2503.16870)."""


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
