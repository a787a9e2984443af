"""Settings of a training run, and its learning rate. Imports no torch, so that a recipe is checked without it."""

import math
from typing import Literal

from pydantic import Field

from components.core.base.config import Config

ComputeDtype = Literal["float32", "bfloat16"]
"""Type of matrix products."""
Optimizer = Literal["adamw", "adamw_8bit"]
"""AdamW, and AdamW whose moments take a byte a value."""

HiddenStateLoss = Literal["cosine", "mse"]
"""Distance of the hidden states of student and teacher: of their angle, or squared and after the norm."""


def compute_dtype(wanted: ComputeDtype | None, stored: str) -> ComputeDtype:
    """Type of the matrix products of a training.

    A float16 model is trained in float32. In float16 small gradients become 0 unless the loss is scaled, and bfloat16
    would round away three bits of the model's own weights.

    Args:
        wanted: what the recipe says.
        stored: precision of the incoming model.
    """
    return wanted or ("bfloat16" if stored == "bfloat16" else "float32")


class TrainConfig(Config):
    """Optimizer, schedule and batch of a training run."""

    num_steps: int = Field(gt=0)
    """Optimizer steps."""
    global_batch_size: int = Field(default=32, gt=0)
    """Packed rows in an optimizer step, over all processes; any number of processes takes the same step."""
    micro_batch_size: int = Field(default=32, gt=0)
    """Packed rows that a process computes at a time."""
    seq_len: int = Field(default=128, gt=1)
    """Tokens of a packed row."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of the schedule."""
    final_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine; the paper goes from 1e-5 to 1e-6."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the steps that climb linearly to the peak; the paper has 0.1."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up; the paper has `cosine` for its largest model, `constant` for the 49B one."""
    optimizer: Optimizer = "adamw"
    """`adamw_8bit` keeps the two moments of AdamW in 8 bits (arXiv 2110.02861): 10 bytes a parameter instead of 16."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay of matrices, none for norms and biases; Llama 2 has 0.1 (arXiv 2307.09288, section 2.2)."""
    dtype: ComputeDtype | None = None
    """Type of matrix products; where null, that of the incoming model: bfloat16 for a bfloat16 one, else float32.
    Weights and optimizer state are float32 in training, and the trained model has the type of the incoming one."""
    compile: bool | None = None
    """Compile each decoder layer with torch.compile. Where not given: in one process on a CPU with a C++ compiler,
    for runs of at least 1e14 FLOPs (about ten minutes on one core); shorter ones end sooner without it."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them: less memory, more time."""
    resume_interval_s: float | None = Field(default=None, gt=0)
    """Seconds between resume points; where null a hundred times what the last one cost, and 30 at least."""
    seed: int | None = None
    """Seed of the order of the data and of all randomness; the recipe's seed if null."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to the peak, then cosine to the end or constant. Source: arXiv 2505.00949, section 4."""
    warmup = math.ceil(config.warmup_fraction * config.num_steps)
    if step < warmup:
        return warm_up(config.learning_rate, step, warmup)
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, config.num_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


def warm_up(peak: float, step: int, num_steps: int) -> float:
    """The learning rate that climbs linearly to its peak in `num_steps` steps, and stays there."""
    return peak * (step + 1) / num_steps if step < num_steps else peak
