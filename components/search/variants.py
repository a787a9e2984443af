"""Sub-blocks without training: the weights of every variant, made from the parent's own.

Shape letters: D hidden size, I channels, K KV heads, H head size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from components.search.space import Part, Variant

Weights = dict[str, Tensor]
"""Tensors of one sub-block by their name within the layer, such as `mlp.up_proj.weight`; its norm belongs to it."""

MODULES: Mapping[Part, tuple[str, str]] = {
    "attention": ("input_layernorm", "self_attn"),
    "ffn": ("post_attention_layernorm", "mlp"),
}
"""Norm and module of each part, as Llama names them."""


def subblock_weights(layer_state: Mapping[str, Tensor], part: Part) -> Weights:
    """The tensors of a layer's state that belong to its attention or to its FFN."""
    prefixes = tuple(f"{module}." for module in MODULES[part])
    return {name: tensor.detach() for name, tensor in layer_state.items() if name.startswith(prefixes)}


def initialise(parent: Weights, variant: Variant, *, importance_I: Tensor | None, head_dim: int) -> Weights:
    """Weights of a variant before any training.

    Args:
        parent: the parent's own sub-block of that layer and part.
        variant: what to make; the no-op has no weights.
        importance_I: contribution of each FFN channel of that layer; needed for a narrower FFN.
        head_dim: size of a head.

    Source: arXiv 2411.19146, appendix A.
    """
    if variant.size == 0:
        return {}
    if variant.part == "attention":
        return pool_kv_heads(parent, variant.size, head_dim)
    width = parent["mlp.up_proj.weight"].shape[0]
    if variant.size == width:
        return dict(parent)
    if importance_I is None or importance_I.shape != (width,):
        raise ValueError(f"a narrower FFN needs the importance of all {width} channels")
    return keep_channels(parent, most_important(importance_I, variant.size))


def most_important(importance_I: Tensor, width: int) -> Tensor:
    """Numbers of the `width` channels that contribute most, best first; equal ones in their own order."""
    return torch.argsort(importance_I, descending=True, stable=True)[:width]


def keep_channels(ffn: Weights, channels: Tensor) -> Weights:
    """An FFN that has only these channels, in this order."""
    narrowed = dict(ffn)
    for name, tensor in ffn.items():
        if name.startswith(("mlp.gate_proj.", "mlp.up_proj.")):
            narrowed[name] = tensor[channels].clone()
    narrowed["mlp.down_proj.weight"] = ffn["mlp.down_proj.weight"][:, channels].clone()
    return narrowed


def pool_kv_heads(attention: Weights, num_heads: int, head_dim: int) -> Weights:
    """An attention with fewer KV heads: neighbours that merge are averaged, weights and biases alike.

    Query heads keep their order, so each now reads the mean of the heads that its own one went into.
    """
    pooled = dict(attention)
    for name, tensor in attention.items():
        if name.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            merged = tensor.shape[0] // (num_heads * head_dim)
            heads = tensor.reshape(num_heads, merged, head_dim, *tensor.shape[1:])
            pooled[name] = heads.mean(dim=1).reshape(num_heads * head_dim, *tensor.shape[1:])
    return pooled
