"""The decoder written out token by token in NumPy and double precision: what the fast one has to equal."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def logits(config: Mapping[str, Any], weights: Mapping[str, Array], tokens: list[int]) -> Array:
    """Logits of one sequence, (T, V), with plain rotary positions."""
    eps = config["rms_norm_eps"]
    stream = [weights["model.embed_tokens.weight"][token] for token in tokens]
    for number, block in enumerate(config["block_configs"]):
        layer = {name.removeprefix(f"model.layers.{number}."): value for name, value in weights.items()}
        if not block["attention"]["no_op"]:
            normed = [_norm(x, layer["input_layernorm.weight"], eps) for x in stream]
            if block["attention"].get("replace_with_linear"):
                mixed = [_linear(layer, "self_attn.linear_attn", x) for x in normed]
            else:
                kv_heads = config["num_attention_heads"] // block["attention"]["n_heads_in_group"]
                mixed = _attention(config, layer, normed, kv_heads)
            stream = [x + y for x, y in zip(stream, mixed, strict=True)]
        if not block["ffn"]["no_op"]:
            stream = [x + _ffn(layer, _norm(x, layer["post_attention_layernorm.weight"], eps)) for x in stream]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return np.stack([head @ _norm(x, weights["model.norm.weight"], eps) for x in stream])


def _norm(x: Array, weight: Array, eps: float) -> Array:
    normed: Array = x / np.sqrt(np.mean(x * x) + eps) * weight
    return normed


def _linear(layer: Mapping[str, Array], name: str, x: Array) -> Array:
    return layer[f"{name}.weight"] @ x + layer.get(f"{name}.bias", 0.0)


def _ffn(layer: Mapping[str, Array], x: Array) -> Array:
    if "mlp.linear_mlp.weight" in layer:
        return _linear(layer, "mlp.linear_mlp", x)
    gate = _linear(layer, "mlp.gate_proj", x)
    return _linear(layer, "mlp.down_proj", gate / (1 + np.exp(-gate)) * _linear(layer, "mlp.up_proj", x))


def _attention(
    config: Mapping[str, Any], layer: Mapping[str, Array], inputs: list[Array], kv_heads: int
) -> list[Array]:
    heads, size, theta = config["num_attention_heads"], config["head_dim"], config["rope_parameters"]["rope_theta"]
    queries, keys, values = (
        [_linear(layer, f"self_attn.{name}_proj", x).reshape(-1, size) for x in inputs] for name in "qkv"
    )
    outputs = []
    for here in range(len(inputs)):
        mixed = []
        for head in range(heads):
            group = head * kv_heads // heads
            query = _rotate(queries[here][head], here, theta)
            seen = [query @ _rotate(keys[there][group], there, theta) / np.sqrt(size) for there in range(here + 1)]
            share = np.exp(np.array(seen) - max(seen))
            share /= share.sum()
            mixed.append(sum(weight * values[there][group] for there, weight in enumerate(share)))
        outputs.append(_linear(layer, "self_attn.o_proj", np.concatenate(mixed)))
    return outputs


def _rotate(x: Array, position: int, theta: float) -> Array:
    half = len(x) // 2
    angles = position * theta ** (-np.arange(half) / half)
    first, second = x[:half], x[half:]
    turned = first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)
    return np.concatenate(turned)
