"""How vLLM serves a model, for every stage and command that starts it. Imports no torch."""

from typing import Self

from pydantic import Field

from components.core.base.config import Config
from components.core.base.ports import HOST
from components.core.model.accelerators import Dtype


class ServingConfig(Config):
    """Precision, devices and address of a vLLM server, and of the engine that generates rollouts."""

    dtype: Dtype | None = None
    """Precision of weights, computation and KV cache; the checkpoint's where null. `float8` needs a GPU that computes
    in it."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Maximum length of a prompt and its answer together, tokens; the model's own limit where null. Stages that know
    their prompts take less where less is enough."""
    gpu_memory_fraction: float | None = Field(default=None, gt=0, le=1)
    """Fraction of a GPU's memory for weights and KV cache; where null, vLLM's own for a server, and 0.4 for an engine
    that shares its GPU with a learner."""
    tensor_parallel: int = Field(default=1, gt=0)
    """Devices that share every layer of a model; an evaluation on more GPUs runs a server for each such group."""
    threads: int = Field(default=1, gt=0)
    """CPU threads of a server."""
    host: str = HOST
    """Address of the network interface that `tessera serve` listens at; `0.0.0.0` is all of them."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port that `tessera serve` listens at; 0 is any free one."""

    def on_loopback(self) -> Self:
        """The same at any free port of the loopback interface, for a server that this process alone asks."""
        return self.model_copy(update={"host": HOST, "port": 0})
