"""What the deployment needs, takes and makes."""

from pydantic import Field

from components.core.base.config import Config
from components.core.runtime.stage import Input, Output, Stage


class Gate(Config):
    """What a model has to show before it becomes the champion; null asks for nothing."""

    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Accuracy with thinking on, standard split."""
    min_format: float | None = Field(default=None, ge=0, le=1)
    """Share of answers that keep their format, in either mode."""
    min_thinking_gain: float | None = Field(default=None, ge=-1, le=1)
    """Accuracy with thinking on minus that with thinking off, hard split where there is one."""


class DeployConfig(Config):
    """Gate, registry and smoke test."""

    name: str = "tessera"
    """Name of the registered model."""
    role: str = "rl"
    """The evaluated model that the gate looks at; the last one evaluated where that is absent."""
    gate: Gate = Gate()
    """Checks that decide between `champion` and `candidate`."""
    fail_on_gate: bool = False
    """Stop with an error where a check fails, instead of registering a candidate."""
    questions: tuple[str, ...] = ("7+5*3-2=",)
    """What the smoke test asks, in both modes, whole and streamed."""
    max_tokens: int = Field(default=128, gt=0)
    """Longest answer of the smoke test, tokens."""
    temperature: float = Field(default=0.6, ge=0)
    """What the bundle tells servers to sample with where a request does not say; 0 is greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus of the distribution, likewise."""
    add_configuration_file: bool = False
    """Put a configuration class into the bundle, for vLLM servers without Tessera that allow remote code."""


STAGE = Stage(
    name="deploy",
    config=DeployConfig,
    inputs={
        "model": Input("model", "the final model"),
        "metrics": Input("table", "metrics.json of the evaluation", optional=True),
    },
    outputs={"bundle": Output("model", "the folder that vLLM serves")},
    entry="components.deploy.stage:run",
    doc="Hold the model to its gate, bundle it, and speak to it in a running vLLM server.",
    source="arXiv 2505.00949, section 7; the model cards' serving notes",
)
