"""Resources: what options take, how bytes follow from shapes alone, and `costs.json`. Light: no torch."""

import math
from typing import Self

from pydantic import Field

from components.core.base.config import Config
from components.core.model.architecture import KV_BYTES_PER_VALUE, WEIGHT_BYTES, Architecture, BlockConfig
from components.core.serving.settings import BATCHED_TOKENS
from components.search.config import Measurement
from components.search.space.layer_space import Size, kv_copies


class Costs(Config):
    """Costs of a sub-block or of a whole model; every resource adds up over sub-blocks."""

    parameters: int = 0
    """Weights, counted."""
    kv_bytes_per_token: int = 0
    """KV cache of one token, bytes, at 2 bytes a value."""
    attention_layers: int = 0
    """Attentions with a KV cache."""
    weight_bytes: int = 0
    """Weights at the served precision, bytes, on all devices together."""
    memory_bytes: int = 0
    """Weights, KV cache of the batch at its full length, and activations, bytes."""
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
        """One resource by name."""
        value: float = getattr(self, resource)
        return value

    def timed(self, *, latency_ms: float, time_to_first_token_ms: float, new_tokens: int) -> Self:
        """These costs with other times.

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
"""Resources that depend on the machine."""


def counted(parameters: int, kv_heads: int, head_dim: int, measurement: Measurement) -> Costs:
    """Costs of weights and KV cache, counted.

    Args:
        parameters: number of weights.
        kv_heads: that are cached; 0 of anything but attention.
        head_dim: size of a head.
        measurement: has the served precision, the tokens that are cached, and the devices that share them.
    """
    size, kv_values = WEIGHT_BYTES[measurement.precision], 2 * kv_heads * head_dim
    cached = kv_values * measurement.kv_tokens * kv_copies(kv_heads, measurement.tensor_parallel)
    return Costs(
        parameters=parameters,
        kv_bytes_per_token=kv_values * KV_BYTES_PER_VALUE,
        attention_layers=int(kv_values > 0),
        weight_bytes=size * parameters,
        memory_bytes=size * (parameters + cached),
    )


def counted_fixed(parameters: int, parent: Architecture, measurement: Measurement) -> Costs:
    """What embeddings, final norm and head take, 16 bits a weight at least, and the activations of any child."""
    weight_bytes = outside_bytes(parameters, measurement)
    memory_bytes = weight_bytes + activation_bytes(parent, measurement)
    return Costs(parameters=parameters, weight_bytes=weight_bytes, memory_bytes=memory_bytes)


def outside_bytes(parameters: int, measurement: Measurement) -> int:
    """Weights outside the layers: engines quantise neither embeddings nor head."""
    return max(2, WEIGHT_BYTES[measurement.precision]) * parameters


def activation_bytes(parent: Architecture, measurement: Measurement) -> int:
    """Memory of the engine's activations while it computes; an estimate, the same for every choice.

    The widest sub-block of the parent for the tokens that are taken in at once, and the logits of the batch in float32.
    """
    tokens = min(measurement.batch_size * measurement.prompt_tokens, max(BATCHED_TOKENS, measurement.prompt_tokens))
    queries = (parent.num_attention_heads + 2 * max(map(kv_heads, parent.blocks))) * parent.head_dim
    widths = [block.intermediate_size for block in parent.blocks if isinstance(block.intermediate_size, int)]
    widest = 2 * parent.hidden_size + max(queries, 2 * max(widths, default=0))
    return (
        tokens * widest * max(2, WEIGHT_BYTES[measurement.precision]) + 4 * measurement.batch_size * parent.vocab_size
    )


def kv_heads(block: BlockConfig) -> int:
    """Heads of a layer that are cached."""
    return block.num_key_value_heads if isinstance(block.num_key_value_heads, int) else 0


def kv_heads_of(costs: Costs, head_dim: int) -> int:
    """Heads that are cached, from what a token of them takes."""
    return costs.kv_bytes_per_token // (2 * KV_BYTES_PER_VALUE * head_dim)


def model_costs(shape: Architecture, measurement: Measurement) -> tuple[Costs, list[Costs]]:
    """What a model takes: the fixed part, and each attention and FFN that is there, in order; times still 0."""
    parts = []
    for block in shape.blocks:
        norm = shape.hidden_size
        if block.num_key_value_heads is not None:
            heads = kv_heads(block)
            parts.append(counted(shape.attention_parameters(block) + norm, heads, shape.head_dim, measurement))
        if block.intermediate_size is not None:
            parts.append(counted(shape.ffn_parameters(block) + norm, 0, shape.head_dim, measurement))
    outside = shape.parameters - sum(part.parameters for part in parts)
    return counted_fixed(outside, shape, measurement), parts


FEW_LAYERS = 4
"""Layers of a measured model at least. Their sum stands out of the noise of a step, and it opens quickly."""
UNCACHED_BYTES = 128 << 20
"""Weights of a measured model at least, as far as the parent has as many: more than the caches of processors and GPUs
hold, so that the weights of few small layers come from memory, as in a whole model."""


def measured_layers(parent: Architecture, measurement: Measurement) -> int:
    """Layers of the models whose times are measured, at most the parent's: times of more layers are sums."""
    if measurement.num_layers is not None:
        return measurement.num_layers
    _, parts = model_costs(parent, measurement)
    a_layer = sum(part.weight_bytes for part in parts) / len(parent.blocks)
    head = outside_bytes(parent.vocab_size * parent.hidden_size, measurement)
    needed = math.ceil((UNCACHED_BYTES - head) / a_layer)
    return min(len(parent.blocks), max(FEW_LAYERS, needed))


COSTS_FILE = "costs.json"


class MeasuredModel(Config):
    """One of the models that were timed."""

    num_key_value_heads: tuple[Size, ...]
    """KV heads of each layer; 0 where there is no attention."""
    intermediate_size: tuple[Size, ...]
    """FFN channels of each layer; 0 where there is no FFN."""
    step_ms: tuple[float, ...]
    """Time of one decode step of the batch; some a round."""
    median_ms: float
    """Median over the rounds: what counts."""
    spread_ms: float
    """Difference of the slowest and the fastest."""
    explained_ms: float
    """What the costs of its sub-blocks and the fixed part add up to."""
    first_token_ms: tuple[float, ...] = ()
    """Time from the prompts of the batch to its first tokens; some a round."""
    median_first_token_ms: float = 0.0
    """Median of those."""
    explained_first_token_ms: float = 0.0
    """What the costs of its sub-blocks and the fixed part add up to."""


class Machine(Config):
    """Where the measurement was made."""

    device: str
    """Processor or accelerator."""
    threads: int
    """CPU threads of the engine."""
    versions: dict[str, str]
    """Versions of the libraries that decide speed."""


class Spread(Config):
    """Spread of the cost of a sub-block over the rounds, when each round is split by itself."""

    latency_ms: float
    """Of a decode step: the largest less the least, milliseconds."""
    time_to_first_token_ms: float
    """Of the prefill: the largest less the least, milliseconds."""


class CostTable(Config):
    """`costs.json`: costs of every sub-block, and the measurements behind them."""

    fixed: Costs
    """Embeddings, final norm and head; the part of a step that no sub-block takes."""
    blocks: dict[str, Costs]
    """Costs by name of the variant, such as `attention-2` or `ffn-256`."""
    machine: Machine
    """Where latency was measured."""
    measurement: Measurement
    """How latency was measured."""
    models: tuple[MeasuredModel, ...]
    """What was measured."""
    spread: dict[str, Spread] = Field(default_factory=dict)
    """Spread of the measured costs by name of the variant; `fixed` is the fixed part."""
