"""The load that generation speed is stated for; light, so that a recipe is checked without torch."""

from pydantic import Field

from components.core.config import Config


class Workload(Config):
    """A batch of requests that vLLM answers at once."""

    batch_size: int = Field(default=32, gt=0)
    """Requests decoded together."""
    prompt_tokens: int = Field(default=16, gt=0)
    """Length of each prompt, tokens."""
    new_tokens: int = Field(default=32, gt=1)
    """Length of each answer, tokens."""
    rounds: int = Field(default=2, gt=0)
    """Times that all models are measured in turn, twice each time; medians count."""
