"""What the evaluation needs, takes and makes."""

from pydantic import Field

from components.core.base.config import Config
from components.core.runtime.stage import Input, Output, Stage
from components.core.serving.load_profile import Workload

ROLES = ("parent", "child", "random_child", "greedy_child", "distilled", "pretrained", "sft", "rl")
"""Inputs that are models, in the order of the recipe."""
WITH_TOGGLE = ("sft", "rl")
"""Models that have both modes; the others answer in their own way, from a plain prompt."""


class EvalConfig(Config):
    """How models are asked, how often, and how fast they are measured to be."""

    num_problems: int = Field(default=250, gt=0)
    """Problems of each split, at most."""
    num_samples: int = Field(default=4, gt=0)
    """Answers to each problem where they are sampled; a greedy answer would only repeat itself."""
    temperature: float = Field(default=0.6, ge=0)
    """Sampling temperature with thinking on; with thinking off, and for base models, answers are greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus of the distribution with thinking on."""
    max_tokens: int = Field(default=128, gt=0)
    """Longest answer, tokens."""
    concurrency: int = Field(default=64, gt=0)
    """Answers that a server generates at a time; more requests wait in it."""
    workload: Workload = Workload(new_tokens=64)
    """The load that tokens per second are measured under."""
    seed: int | None = None
    """Seed of all sampling; the recipe's seed where not given."""


STAGE = Stage(
    name="eval",
    config=EvalConfig,
    inputs={
        "problems": Input(
            "data", "test-standard.jsonl and test-hard.jsonl, rows {id, question, prompt (for base models), answer}"
        ),
        **{role: Input("model", f"the model in the role {role}", optional=True) for role in ROLES},
    },
    outputs={
        "metrics": Output("table", "metrics.json: accuracy, interval, format and speed; answers.jsonl: every answer")
    },
    entry="components.eval.stage:run",
    doc="Ask every model so far in both modes through a vLLM server, and measure how fast each architecture generates.",
    source="arXiv 2505.00949, section 7",
)
