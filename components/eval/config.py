"""Settings, inputs and outputs of the evaluation."""

from pydantic import Field

from components.core.base.config import Config
from components.core.runtime.stage import Input, Output, Stage, always_measures
from components.core.serving.load_profile import Workload
from components.core.serving.serving_config import ServingConfig

ROLES = ("parent", "child", "random_child", "greedy_child", "distilled", "pretrained", "sft", "rl")
"""Inputs that are models, in the order of the recipe."""
WITH_TOGGLE = ("sft", "rl")
"""Models that have both modes. The others are asked in their own chat template, or complete a plain prompt."""


class HeldOutText(Config):
    """The text that perplexity is measured on: the beginning of the corpus's validation split, packed."""

    seq_len: int = Field(default=256, gt=1)
    """Tokens of a packed row. Perplexities of different lengths do not compare: longer rows give lower ones."""
    batch_size: int = Field(default=8, gt=0)
    """Rows that are computed together."""
    num_batches: int = Field(default=8, gt=0)
    """Maximum number of batches."""
    seed: int = 0
    """Seed of the order of the rows."""


class EvalConfig(Config):
    """Sampling, limits, held-out text, and the load for measuring speed."""

    num_problems: int = Field(default=250, gt=0)
    """Maximum number of problems of each split, and of each task."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, or groups of them, that every model is given besides, such as `gsm8k` or those of
    `eval.task_files`. Their data has to be in the cache of `datasets` or in that folder: nothing is downloaded."""
    num_samples: int = Field(default=4, gt=0)
    """Sampled answers per problem. Greedy answers to a problem are all the same, so there is one."""
    temperature: float = Field(default=0.6, ge=0)
    """Sampling temperature of every model; with thinking off, answers are greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus of the distribution to sample from; greedy answers have none."""
    max_tokens: int = Field(default=128, gt=0)
    """Maximum length of an answer, tokens."""
    concurrency: int = Field(default=64, gt=0)
    """Requests that a server processes at the same time."""
    held_out: HeldOutText = HeldOutText()
    """Text for measuring perplexity."""
    workload: Workload = Workload(new_tokens=64)
    """Load for measuring tokens per second."""
    serving: ServingConfig = ServingConfig()
    """How each model is served; what is left out comes from the recipe's own `serving`."""
    seed: int | None = None
    """Seed of all sampling; the recipe's seed if null."""


STAGE = Stage(
    name="eval",
    config=EvalConfig,
    inputs={
        "problems": Input(
            "data",
            "test-standard.jsonl and test-hard.jsonl, rows {id, question, prompt (for base models), answer}",
            optional=True,
        ),
        "task_files": Input("data", "task files of lm-eval, YAML, and the data that they name", optional=True),
        "corpus": Input("data", "validation.jsonl with rows {text} or {prompt, completion}", optional=True),
        **{role: Input("model", f"the model in the role {role}", optional=True) for role in ROLES},
    },
    outputs={
        "metrics": Output(
            "table",
            "metrics.json: accuracy, gains, intervals, format, perplexity, speed, tasks; answers.jsonl: every answer; "
            "task_samples.jsonl: every problem of the tasks with its grades",
        )
    },
    entry="components.eval.stage:run",
    doc="Ask every model so far in both modes through a vLLM server; measure perplexity on held-out text, and speed.",
    source="arXiv 2505.00949, section 7",
    measures_time=always_measures,
)
