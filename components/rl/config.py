"""Settings, inputs and outputs of reinforcement learning."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from components.core.base.config import Config
from components.core.runtime.stage import Input, Output, Stage
from components.core.serving.serving_config import ServingConfig
from components.core.training.train_config import ComputeDtype, Optimizer

Loss = Literal["grpo", "dapo", "dr_grpo", "rloo"]
"""Losses by the names of their papers; they differ in the advantages and in the weights of tokens."""


class RlConfig(Config):
    """GRPO with accuracy and format rewards."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"thinking_off_share": "thinking_off_fraction"}

    num_steps: int = Field(default=40, ge=0)
    """Rollouts, each followed by `updates_per_step` optimizer steps."""
    prompts_per_step: int = Field(default=16, gt=0)
    """Different problems in a rollout; the paper has 72."""
    samples_per_prompt: int = Field(default=16, gt=1)
    """Answers to each problem: a group, within which advantages are computed; the paper has 16."""
    dynamic_sampling: int = Field(default=0, ge=0)
    """Further problems of a step, as a multiple of `prompts_per_step`, from which groups are replaced whose rewards are
    all alike, so that a step learns from as many groups as it has prompts (DAPO, arXiv 2503.14476, section 3.2)."""
    updates_per_step: int = Field(default=2, gt=0)
    """Optimizer steps after each rollout, each on an equal part of the prompts; the paper has 2."""
    micro_batch_size: int = Field(default=128, gt=0)
    """Answers that the learner computes at a time."""
    max_tokens: int = Field(default=96, gt=0)
    """Maximum length of an answer, tokens."""
    mask_truncated: bool = False
    """Leave the tokens of answers that were cut off at `max_tokens` out of the loss (DAPO, arXiv 2503.14476, section
    3.4); their rewards count in the advantages of their group."""
    overlong_buffer: int = Field(default=0, ge=0)
    """Tokens before `max_tokens` in which the reward of an answer falls by up to 1 with its length (DAPO, arXiv
    2503.14476, section 3.4); 0: the length has no reward."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the rollouts; the paper has 1."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Learning rate after the warm-up, constant."""
    optimizer: Optimizer = "adamw"
    """`adamw_8bit` keeps the two moments of AdamW in 8 bits (arXiv 2110.02861): 10 bytes a parameter instead of 16."""
    warmup_steps: int = Field(default=2, ge=0)
    """Optimizer steps that climb linearly to the learning rate."""
    loss: Loss = "dapo"
    """`grpo`: advantages in units of the group's spread, the mean over the tokens of each answer (arXiv 2402.03300);
    `dapo`: those advantages, the mean over the tokens of all answers (arXiv 2503.14476); `dr_grpo`: no division by the
    spread or by an answer's length (arXiv 2503.20783); `rloo`: the mean of the other answers as the baseline, the sum
    over the tokens of an answer (arXiv 2402.14740)."""
    clip_ratio: float = Field(default=0.2, gt=0, lt=1)
    """The probability ratio is clipped below 1 minus this (arXiv 1707.06347, section 3)."""
    clip_ratio_high: float | None = Field(default=None, gt=0)
    """The probability ratio is clipped above 1 plus this; `clip_ratio` where null, DAPO has 0.28 (clip-higher)."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of KL(policy || incoming model) in the loss; GRPO has 0.04 (arXiv 2402.03300), the paper's RLHF 1e-3."""
    thinking_off_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the prompts of a rollout that are asked with thinking off; the paper rewards both formats."""
    max_pass_rate: float = Field(default=0.75, gt=0, le=1)
    """Problems that the incoming model solves at least this often are dropped; the paper has 0.75."""
    pass_rate_samples: int = Field(default=8, gt=0)
    """Answers to each problem from which its pass rate is estimated; the paper has 8."""
    start_without_reward: bool = False
    """Start although the incoming model solves no problem; without it such a start is refused."""
    min_level: int = Field(default=0, ge=0)
    """Problems of a lower level are not drawn. The data gives each problem its level; without one it is 0."""
    max_problems: int = Field(default=512, gt=0)
    """Maximum number of problems drawn from the training split, before easy ones are dropped."""
    resume_interval_s: float | None = Field(default=None, gt=0)
    """Seconds between resume points; where null a hundred times what the last one cost, and 30 at least."""
    dtype: ComputeDtype | None = None
    """Type of the learner's matrix products; where null, that of the incoming model: bfloat16 for a bfloat16 one, else
    float32. The learner's weights are float32; the written policy has the type of the incoming model."""
    serving: ServingConfig = ServingConfig()
    """The engine that generates; what is left out comes from the recipe's own `serving`. Of it, `dtype` and
    `gpu_memory_fraction` count: the engine is in the learner's process, and as long as the longest prompt needs."""
    seed: int | None = None
    """Seed of the order of the problems and of all sampling; the recipe's seed if null."""

    @model_validator(mode="after")
    def _one_engine_whose_weights_change(self) -> Self:
        if self.serving.tensor_parallel > 1:
            raise ValueError("rl generates on the learner's device: set rl.serving.tensor_parallel to 1")
        if self.serving.dtype == "float8":
            raise ValueError("rl replaces the engine's weights, which float8 cannot: set rl.serving.dtype to bfloat16")
        return self


STAGE = Stage(
    name="rl",
    config=RlConfig,
    inputs={
        "model": Input("model", "a model with the toggle, as fine-tuned"),
        "problems": Input("data", "train.jsonl with rows {id, question, answer, level}"),
    },
    outputs={"policy": Output("model", "the reinforced model")},
    entry="components.rl.stage:run",
    doc="Reinforce right answers in the right format with GRPO; vLLM generates, weights go over in memory.",
    source="arXiv 2505.00949, section 5",
)
