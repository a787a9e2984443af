"""Settings, inputs and outputs of pretraining."""

from typing import Self

from pydantic import Field, model_validator

from components.core.base.config import Config
from components.core.runtime.stage import Input, Output, Stage
from components.core.training.train_config import TrainConfig


class Shape(Config):
    """A dense Llama to train from scratch."""

    hidden_size: int = Field(default=128, gt=0)
    """Width of the residual stream."""
    num_hidden_layers: int = Field(default=12, gt=0)
    """Decoder layers."""
    num_attention_heads: int = Field(default=4, gt=0)
    """Query heads a layer; must divide `hidden_size`."""
    num_key_value_heads: int = Field(default=4, gt=0)
    """Key and value heads a layer; must divide `num_attention_heads`."""
    intermediate_size: int = Field(default=384, gt=0)
    """Width of the SwiGLU feed-forward network."""
    max_position_embeddings: int = Field(default=512, gt=0)
    """Longest context, tokens."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of new weights."""

    @model_validator(mode="after")
    def _widths_divide(self) -> Self:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ValueError(f"hidden_size={self.hidden_size} does not divide by num_attention_heads={heads}")
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} does not divide by num_key_value_heads={kv_heads}")
        return self


class PretrainConfig(TrainConfig):
    """Next-token training on the corpus."""

    shape: Shape = Shape()
    """Shape of a new model; used only if there is no model to train further."""


STAGE = Stage(
    name="pretrain",
    config=PretrainConfig,
    inputs={
        "model": Input("model", "the model to train further; a new one of `shape` if absent", optional=True),
        "tokenizer": Input("tokenizer", "the tokenizer of a new model; another model brings its own"),
        "corpus": Input("data", "train.jsonl with rows {text} or {prompt, completion}"),
    },
    outputs={"trained": Output("model", "the trained model with its tokenizer")},
    entry="components.pretrain.stage:run",
    doc="Train on text: a dense parent from scratch, or a child further.",
    source="arXiv 2505.00949, section 2.2",
)
