"""The load that generation speed is measured under. Imports no torch."""

from typing import Literal

from pydantic import Field

from components.core.base.config import Config

Dtype = Literal["float32", "bfloat16", "float8"]


class Workload(Config):
    """A batch of requests that vLLM processes together."""

    batch_size: int = Field(default=32, gt=0)
    """Requests decoded together."""
    prompt_tokens: int = Field(default=16, gt=0)
    """Length of each prompt, tokens."""
    new_tokens: int = Field(default=32, gt=1)
    """Length of each answer, tokens."""
    rounds: int = Field(default=5, gt=0)
    """Times that all models are measured in turn, each right after the first of them; medians count."""

    @property
    def batch_tokens(self) -> int:
        """New tokens of the batch."""
        return self.batch_size * self.new_tokens


class LoadProfile(Workload):
    """A load, and how the model is deployed under it."""

    dtype: Dtype = "float32"
    """Precision of weights, activations and KV cache; `float8` needs a GPU that computes in it."""
    tensor_parallel: int = Field(default=1, gt=0)
    """Devices that share every layer."""
