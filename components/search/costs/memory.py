"""What follows from shapes alone: the bytes of weights, KV cache and activations. Light: no torch."""

from components.core.model.architecture import KV_BYTES_PER_VALUE, WEIGHT_BYTES, Architecture, BlockConfig
from components.core.serving.settings import BATCHED_TOKENS
from components.search.config import Measurement
from components.search.costs.resources import Costs
from components.search.space.layer_space import kv_copies


def counted(parameters: int, kv_heads: int, head_dim: int, measurement: Measurement) -> Costs:
    """What weights and KV cache take.

    Args:
        parameters: number of weights.
        kv_heads: that are cached; 0 of anything but attention.
        head_dim: size of a head.
        measurement: has the served precision, the tokens that are cached, and the devices that share them.
    """
    size, kv_values = WEIGHT_BYTES[measurement.dtype], 2 * kv_heads * head_dim
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
    return max(2, WEIGHT_BYTES[measurement.dtype]) * parameters


def activation_bytes(parent: Architecture, measurement: Measurement) -> int:
    """What the engine holds beside weights and cache while it computes: an estimate that no choice changes.

    The widest sub-block of the parent for the tokens that are taken in at once, and the logits of the batch in float32.
    """
    tokens = min(measurement.batch_size * measurement.prompt_tokens, max(BATCHED_TOKENS, measurement.prompt_tokens))
    queries = (parent.num_attention_heads + 2 * max(map(kv_heads, parent.blocks))) * parent.head_dim
    widths = [block.intermediate_size for block in parent.blocks if isinstance(block.intermediate_size, int)]
    widest = 2 * parent.hidden_size + max(queries, 2 * max(widths, default=0))
    return tokens * widest * max(2, WEIGHT_BYTES[measurement.dtype]) + 4 * measurement.batch_size * parent.vocab_size


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
