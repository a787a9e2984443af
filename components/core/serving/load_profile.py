"""The load that generation speed is measured under. Imports no torch."""

from typing import Self

from pydantic import Field

from components.core.base.config import Config
from components.core.model.accelerators import Dtype
from components.core.model.inspection import StoredDtype


class Workload(Config):
    """A batch of requests that vLLM processes together."""

    batch_size: int = Field(default=32, gt=0)
    """Requests decoded together."""
    prompt_tokens: int = Field(default=16, gt=0)
    """Length of each prompt, tokens."""
    new_tokens: int = Field(default=32, gt=1)
    """Length of each answer, tokens."""
    rounds: int = Field(default=5, gt=0)
    """Times that all models are measured in turn, each right after the first of them; medians count. The evaluation
    goes on, to at most four times as many, until every speed is known to 3 %."""

    @property
    def batch_tokens(self) -> int:
        """New tokens of the batch."""
        return self.batch_size * self.new_tokens


class LoadProfile(Workload):
    """A load, and how the model is deployed under it."""

    dtype: Dtype | None = None
    """Precision of weights, activations and KV cache; the checkpoint's where null. `float8` needs a GPU that computes
    in it."""
    tensor_parallel: int = Field(default=1, gt=0)
    """Devices that share every layer."""

    @property
    def precision(self) -> Dtype:
        """The precision, which is float32 until a checkpoint or the settings say otherwise."""
        return self.dtype or "float32"

    def served_as(self, stored: StoredDtype) -> Self:
        """This load for a checkpoint of that precision."""
        return self if self.dtype else self.model_copy(update={"dtype": stored})
