"""Settings, inputs and outputs of supervised fine-tuning."""

from components.core.runtime.stage import Input, Output, Stage
from components.core.training.train_config import TrainConfig


class SftConfig(TrainConfig):
    """Supervised fine-tuning on chats of both modes."""


STAGE = Stage(
    name="sft",
    config=SftConfig,
    inputs={
        "model": Input("model", "the model to tune"),
        "tokenizer": Input("tokenizer", "a tokenizer with the toggle: `<think>`, `</think>` and the chat template"),
        "chats": Input("data", "train.jsonl with rows {messages, reasoning}"),
    },
    outputs={"tuned": Output("model", "the model whose thinking can be switched on and off")},
    entry="components.sft.stage:run",
    doc="Teach both modes of detailed thinking, loss on the answers alone.",
    source="arXiv 2505.00949, section 4",
)
