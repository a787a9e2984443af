"""What every option of a search scores and costs: what the solver chooses from, and `search.json` holds."""

from typing import Self

from components.core.base.config import Config


class Costs(Config):
    """What a sub-block, or a whole model, takes; all of it adds up over sub-blocks."""

    parameters: int = 0
    """Weights, counted."""
    kv_bytes_per_token: int = 0
    """KV cache of one token, bytes, at 2 bytes a value."""
    attention_layers: int = 0
    """Attentions with a KV cache."""
    weight_bytes: int = 0
    """Weights at the served precision, bytes, on all devices together."""
    memory_bytes: int = 0
    """Those, the KV cache of the batch at its full length, and what is computed meanwhile, bytes."""
    latency_ms: float = 0.0
    """Share of one decode step of the batch, milliseconds."""
    time_to_first_token_ms: float = 0.0
    """Share of the time from the prompts of the batch to its first tokens, milliseconds."""
    request_ms: float = 0.0
    """Share of the time from the prompts to the last tokens, milliseconds."""

    def __add__(self, other: Self) -> Self:
        """Costs add up over sub-blocks."""
        return self.model_copy(update={name: self.of(name) + other.of(name) for name in RESOURCES})

    def of(self, resource: str) -> float:
        """One of them by name."""
        value: float = getattr(self, resource)
        return value

    def timed(self, *, latency_ms: float, time_to_first_token_ms: float, new_tokens: int) -> Self:
        """The same with other times.

        Args:
            latency_ms: one decode step.
            time_to_first_token_ms: prefill.
            new_tokens: of a request; the first comes with the prefill.
        """
        times = {
            "latency_ms": latency_ms,
            "time_to_first_token_ms": time_to_first_token_ms,
            "request_ms": time_to_first_token_ms + (new_tokens - 1) * latency_ms,
        }
        return self.model_copy(update=times)


RESOURCES = tuple(Costs.model_fields)
TIMES = ("latency_ms", "time_to_first_token_ms", "request_ms")
"""Those that depend on the machine."""
