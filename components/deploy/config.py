"""Settings, inputs and outputs of the deployment."""

from pydantic import Field

from components.core.base.config import Config
from components.core.runtime.stage import Input, Output, Stage
from components.core.serving.serving_config import ServingConfig


class Gate(Config):
    """Conditions for a model to be promoted; null means no condition."""

    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Accuracy with thinking on, standard split."""
    min_format: float | None = Field(default=None, ge=0, le=1)
    """Fraction of answers with the format of their mode, in the worse of the two modes."""
    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    """Perplexity on held-out text over that of the parent."""
    min_thinking_gain: float | None = Field(default=None, ge=-1, le=1)
    """Accuracy with thinking on minus that with thinking off, on the hard split if there is one."""


class DeployConfig(Config):
    """Gate, registry and smoke test."""

    name: str = "tessera"
    """Name of the registered model."""
    role: str = "rl"
    """Role of the evaluated model that the gate checks; the last evaluated one if that is absent."""
    gate: Gate = Gate()
    """Checks without which the model is not promoted."""
    fail_on_gate: bool = False
    """Fail the stage if a check fails, instead of registering a candidate."""
    questions: tuple[str, ...] = ("7+5*3-2=",)
    """Questions of the smoke test, asked in both modes, with and without streaming."""
    max_tokens: int = Field(default=128, gt=0)
    """Maximum length of an answer in the smoke test, tokens."""
    temperature: float = Field(default=0.6, ge=0)
    """Default sampling temperature in the bundle, for requests that set none; 0 is greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Default nucleus of the distribution in the bundle."""
    serving: ServingConfig = ServingConfig()
    """How the smoke test serves the bundle; what is left out comes from the recipe's own `serving`."""
    add_configuration_file: bool = False
    """Add a configuration class to the bundle, for vLLM servers without Tessera that allow remote code."""


STAGE = Stage(
    name="deploy",
    config=DeployConfig,
    inputs={
        "model": Input("model", "the final model"),
        "metrics": Input("table", "metrics.json of the evaluation", optional=True),
    },
    outputs={"bundle": Output("model", "the folder that vLLM serves")},
    entry="components.deploy.stage:run",
    doc="Check the model against its gate, bundle it, and smoke-test it in a running vLLM server.",
    source="arXiv 2505.00949, section 7; the model cards' serving notes",
)
