"""Sub-blocks without training: the weights of every variant, made from the parent's own.

Shape letters: D hidden size, I channels, K KV heads, H head size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from components.core.model.architecture import LINEAR
from components.search.space.layer_space import Part, Variant

Weights = dict[str, Tensor]
"""Tensors of one sub-block by their name within the layer, such as `mlp.up_proj.weight`; its norm belongs to it."""

MODULES: Mapping[Part, tuple[str, str]] = {
    "attention": ("input_layernorm", "self_attn"),
    "ffn": ("post_attention_layernorm", "mlp"),
}
"""Norm and module of each part, as Llama names them."""

LINEAR_WEIGHT: Mapping[Part, str] = {"attention": "linear_attn.weight", "ffn": "linear_mlp.weight"}
"""The matrix in the module of a linear part, as NVIDIA names it."""


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
    if variant.size == LINEAR:
        return linear(parent, variant.part, head_dim)
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


def linear(parent: Weights, part: Part, head_dim: int) -> Weights:
    """One matrix behind the parent's own norm: what the sub-block does without softmax, gate and biases.

    An attention then is W_O W_V, each query head with the values that it reads: exact where a token sees itself alone.
    An FFN is W_down W_up, as if the gate were open.
    """
    norm, module = MODULES[part]
    name = f"{module}.{LINEAR_WEIGHT[part]}"
    if name in parent:
        return dict(parent)
    if part == "attention":
        last, first = parent["self_attn.o_proj.weight"], parent["self_attn.v_proj.weight"]
        heads = first.reshape(-1, head_dim, first.shape[1])
        first = heads.repeat_interleave(last.shape[1] // first.shape[0], dim=0).flatten(0, 1)
    else:
        last, first = parent["mlp.down_proj.weight"], parent["mlp.up_proj.weight"]
    product = (last.float() @ first.float()).to(last.dtype)
    return {f"{norm}.weight": parent[f"{norm}.weight"], name: product}


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
