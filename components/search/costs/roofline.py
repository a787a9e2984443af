"""Predicted times: what a sub-block takes on a device that is not here, from its data sheet. Light: no torch.

A pass of a sub-block over some tokens takes

    weights / bandwidth + cache / bandwidth + operations / peak + all-reduce / link + starts

with each peak at the share of it that is reached in practice. The terms are added: no part of one hides behind another,
which is what fits published figures best (`tests/bench/roofline.py` compares). Under tensor parallelism every device
has an equal part of weights, cache and operations, and the outputs of a sub-block are summed over the devices.

Prefill and decode differ in what counts: prefill multiplies all tokens of all prompts with every weight, and attends to
half the prompt on average; a decode step multiplies one token a request, and reads the whole cache.
"""

from dataclasses import dataclass

from components.core.base.errors import RecipeError
from components.core.model.accelerators import Device, Dtype
from components.core.model.architecture import KV_BYTES_PER_VALUE, WEIGHT_BYTES, Architecture
from components.search.config import Measurement
from components.search.costs.resources import Costs, kv_heads_of, model_costs
from components.search.space.layer_space import kv_copies

STREAMED = 0.90
"""Share of the bandwidth of memory or link at which weights, activations and all-reduces are moved."""
CACHED = 0.55
"""Share of the bandwidth of memory at which attention reads the KV cache."""
COMPUTED = 0.70
"""Share of the peak that large matrix products reach."""
HIDDEN_PASSES = 4
"""Times that a sub-block reads or writes the hidden states of its tokens."""
RUNTIME_BYTES = 2 << 30
"""Memory of a device that its runtime takes for itself."""
CACHE_SHARE = 0.9
"""Share of the memory that weights leave which engines give to the KV cache."""


@dataclass(frozen=True)
class Pass:
    """One forward pass: a prefill or a decode step.

    Attributes:
        tokens: that go through every sub-block.
        logits: tokens whose logits are computed.
        attended: pairs of a token and one that it attends to.
        cached: tokens whose keys and values are read from the cache.
    """

    tokens: int
    logits: int
    attended: float
    cached: float

    @classmethod
    def prefill(cls, load: Measurement) -> "Pass":
        """All prompts of a batch."""
        tokens = load.batch_size * load.prompt_tokens
        return cls(tokens, load.batch_size, tokens * load.prompt_tokens / 2, tokens)

    @classmethod
    def decode(cls, load: Measurement) -> "Pass":
        """One step, half way through the answers."""
        context = load.batch_size * (load.prompt_tokens + load.new_tokens / 2)
        return cls(load.batch_size, load.batch_size, context, context)


def predicted(costs: Costs, shape: Architecture, load: Measurement, device: Device) -> Costs:
    """A sub-block with its times on a device; a no-op takes none.

    Args:
        costs: its parameters and KV bytes.
        shape: the model that it is in.
        load: batch, lengths, precision and tensor-parallel degree.
        device: figures of its data sheet.

    Raises:
        RecipeError: the device cannot compute at this precision, or has no link to others.
    """
    require_support(load, device)
    decode, prefill = (1000 * _subblock_s(costs, shape, load, device, phase) for phase in _phases(load))
    return costs.timed(latency_ms=decode, time_to_first_token_ms=prefill, new_tokens=load.new_tokens)


def predicted_fixed(costs: Costs, shape: Architecture, load: Measurement, device: Device) -> Costs:
    """Costs outside the layers with their times on a device: the head, which is never below 16 bits."""
    require_support(load, device)
    decode, prefill = (1000 * _head_s(shape, load, device, phase) for phase in _phases(load))
    return costs.timed(latency_ms=decode, time_to_first_token_ms=prefill, new_tokens=load.new_tokens)


def predicted_model(shape: Architecture, load: Measurement, device: Device) -> Costs:
    """A whole model: memory, and times on a device."""
    fixed, parts = model_costs(shape, load)
    whole = predicted_fixed(fixed, shape, load, device)
    return sum((predicted(part, shape, load, device) for part in parts), start=whole)


def largest_batch(shape: Architecture, load: Measurement, device: Device, most: int) -> int:
    """Requests of full length whose KV cache fits into the memory that weights leave, `most` at most."""
    whole = sum(model_costs(shape, load)[1], start=model_costs(shape, load)[0])
    per_request = whole.kv_bytes_per_token // KV_BYTES_PER_VALUE * WEIGHT_BYTES[load.precision]
    per_request *= load.prompt_tokens + load.new_tokens
    free = load.tensor_parallel * (device.memory_bytes - RUNTIME_BYTES) - whole.weight_bytes
    return max(0, min(most, int(CACHE_SHARE * free) // per_request if per_request else most))


def require_support(load: Measurement, device: Device) -> None:
    """Refuse a load that a device cannot serve.

    Raises:
        RecipeError: the device cannot compute at this precision, or has no link to others.
    """
    if load.precision not in device.flops:
        raise RecipeError(
            f"{device.name} does not compute in {load.precision}",
            hint=f"set measurement.dtype to {', '.join(device.flops)}",
        )
    if load.tensor_parallel > 1 and device.link_bytes_per_s is None:
        raise RecipeError(
            f"{device.name} has no link for tensor_parallel={load.tensor_parallel}",
            hint="set measurement.tensor_parallel to 1",
        )


def _phases(load: Measurement) -> tuple[Pass, Pass]:
    return Pass.decode(load), Pass.prefill(load)


def _subblock_s(costs: Costs, shape: Architecture, load: Measurement, device: Device, phase: Pass) -> float:
    """Seconds of one pass of an attention, FFN or linear sub-block."""
    if not costs.parameters:
        return 0.0
    ranks, size = load.tensor_parallel, WEIGHT_BYTES[load.precision]
    copies = kv_copies(kv_heads_of(costs, shape.head_dim), ranks)
    cached_bytes = phase.cached * copies * costs.kv_bytes_per_token / KV_BYTES_PER_VALUE * size
    hidden_bytes = phase.tokens * shape.hidden_size * max(2, size)
    streamed = (size * costs.parameters / ranks + HIDDEN_PASSES * hidden_bytes) / (STREAMED * device.bytes_per_s)
    cache = cached_bytes / ranks / (CACHED * device.bytes_per_s)
    products = 2 * costs.parameters * phase.tokens / ranks / (COMPUTED * device.flops[load.precision])
    pairs = 0.0
    if costs.attention_layers and phase.tokens > phase.logits:  # in a decode step the cache is what takes time
        width = shape.num_attention_heads * shape.head_dim
        pairs = 4 * phase.attended * width / ranks / (COMPUTED * device.flops[_wide(load)])
    return streamed + cache + products + pairs + _all_reduce_s(hidden_bytes, ranks, device) + device.subblock_s


def _head_s(shape: Architecture, load: Measurement, device: Device, phase: Pass) -> float:
    """Seconds of the logits of one pass."""
    dtype, ranks = _wide(load), load.tensor_parallel
    parameters = shape.vocab_size * shape.hidden_size / ranks
    streamed = WEIGHT_BYTES[dtype] * parameters / (STREAMED * device.bytes_per_s)
    return (
        streamed + 2 * parameters * phase.logits / (COMPUTED * device.flops[dtype]) + device.subblock_s + device.step_s
    )


def _wide(load: Measurement) -> Dtype:
    """The precision of what is not quantised."""
    return "bfloat16" if load.precision == "float8" else load.precision


def _all_reduce_s(hidden_bytes: float, ranks: int, device: Device) -> float:
    """Seconds to sum hidden states over the devices, each of which sends and receives nearly twice their size."""
    if ranks == 1 or device.link_bytes_per_s is None:
        return 0.0
    return device.link_s + 2 * (ranks - 1) / ranks * hidden_bytes / (STREAMED * device.link_bytes_per_s)
