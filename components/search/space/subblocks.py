"""Sub-blocks: their weights made from the parent's own, the modules and models built of them, and their files.

Shape letters: D hidden size, I channels, K KV heads, H head size.
"""

from collections.abc import Iterable, Mapping
from itertools import starmap
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from components.core.model.architecture import LINEAR, Architecture
from components.core.model.checkpoint import assign_weights, model_config
from components.core.model.decoder import DecoderLayer, TesseraConfig, TesseraForCausalLM
from components.core.model.layer_files import write_block
from components.core.model.layer_numbering import LAYERS
from components.search.space.layer_space import Part, Shape, Variant, block_of
from components.search.space.layer_space import shape_of as shape_of_architecture

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


def on_device(weights: Weights, device: torch.device) -> Weights:
    """The same tensors on a device: what a library or an artifact has is read to the CPU."""
    return {name: tensor.to(device) for name, tensor in weights.items()}


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
    channels = most_important(importance_I, variant.size)
    return keep_channels(parent, channels.to(parent["mlp.up_proj.weight"].device))


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


class Subblock(nn.Module):
    """The attention or the FFN of a layer, with its norm.

    Attributes:
        part: which of the two.
        storage_dtype: precision of the weights that `weights` returns; that of the module where None.
    """

    def __init__(self, part: Part, norm: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.storage_dtype: torch.dtype | None = None
        self.norm, self.module = norm, module

    @classmethod
    def of(cls, layer: nn.Module, part: Part) -> Self | None:
        """The sub-block of a decoder layer, sharing its weights; None where it is a no-op."""
        norm, module = (getattr(layer, name) for name in MODULES[part])
        return None if module is None else cls(part, norm, module)

    def forward(self, hidden_BTD: Tensor, context: tuple[Any, ...]) -> Tensor:
        """Output that is added to the residual stream.

        Args:
            hidden_BTD: the residual stream.
            context: the other arguments of the module: positions and mask; empty for an FFN.
        """
        output_BTD: Tensor = self.module(self.norm(hidden_BTD), *context)
        return output_BTD

    def weights(self) -> Weights:
        """Tensors by their name within a layer, at the precision that they came with."""
        return {
            self._outside(name): tensor.to(self.storage_dtype or tensor.dtype)
            for name, tensor in self.state_dict().items()
        }

    def load_weights(self, weights: Weights, *, training: bool) -> None:
        """Take tensors that are named as within a layer: copies in float32 to be trained, or the very tensors."""
        state = {name: weights[self._outside(name)].detach() for name in self.state_dict()}
        if training:
            self.storage_dtype = next(iter(state.values())).dtype
            state = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
        self.load_state_dict(state, assign=True)
        self.requires_grad_(training)

    def _outside(self, name: str) -> str:
        """The name within a layer of a tensor of this module."""
        own, _, rest = name.partition(".")
        norm, module = MODULES[self.part]
        return f"{norm if own == 'norm' else module}.{rest}"


BlockKey = tuple[int, Variant]
"""A variant in its layer."""


def block_name(key: BlockKey) -> str:
    """Name of a variant of a layer, unique in a library."""
    layer, variant = key
    return f"{layer}/{variant.name}"


def save_block(folder: Path, key: BlockKey, weights: Weights) -> None:
    """Write one variant as the file that a model has which holds it in this layer: a store keeps the bytes once."""
    path = block_path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_block(path, {f"{_prefix(key)}{name}": tensor for name, tensor in weights.items()})


def load_block(folders: Iterable[Path], key: BlockKey) -> Weights:
    """Read one variant from the library folder that has it.

    Raises:
        FileNotFoundError: none has it.
    """
    for folder in folders:
        path = block_path(folder, key)
        if path.is_file():
            return {name.removeprefix(_prefix(key)): tensor for name, tensor in load_file(path).items()}
    raise FileNotFoundError(f"no library has {block_path(Path(), key)}")


def _prefix(key: BlockKey) -> str:
    """What a model puts before the names of tensors within the layer."""
    return f"{LAYERS}{key[0]}."


def block_path(folder: Path, key: BlockKey) -> Path:
    """Where a library keeps a variant."""
    layer, variant = key
    return folder / f"layer-{layer}" / f"{variant.name}.safetensors"


def heterogeneous_model(parent: PretrainedConfig, shape: Shape) -> TesseraForCausalLM:
    """A model like the parent but for its layers, with random weights."""
    model = TesseraForCausalLM(reshaped(parent, shape))
    model.train(False)
    return model


def build_subblock(
    parent: TesseraForCausalLM, layer: int, variant: Variant, weights: Weights, *, training: bool = True
) -> Subblock:
    """A variant of a layer's attention or FFN as a module.

    Args:
        parent: the model that the layer is of.
        layer: its number.
        variant: what the module is.
        weights: its tensors by their name within the layer.
        training: own a copy of them in float32 that can be trained; else these very tensors, where they are on the
            parent's device.
    """
    weights = on_device(weights, parent.device)
    config = reshaped(parent.config, _shape_with(parent, layer, variant))
    with torch.device("meta"):
        block = Subblock.of(DecoderLayer(config, layer), variant.part)
    assert block is not None, "the no-op is no module"
    block.load_weights(weights, training=training)
    return block


def with_replaced(parent: TesseraForCausalLM, key: BlockKey, block: Subblock | None) -> TesseraForCausalLM:
    """The parent with one sub-block replaced, sharing all other weights with it.

    Args:
        parent: in memory.
        key: layer, and what is put there.
        block: its module; None is the no-op.
    """
    layer, variant = key
    with torch.device("meta"):
        model = heterogeneous_model(parent.config, _shape_with(parent, layer, variant))
    prefix = f"{LAYERS}{layer}."
    replaced = {prefix + name for name in subblock_weights(parent.model.layers[layer].state_dict(), variant.part)}
    state = {name: value for name, value in parent.state_dict().items() if name not in replaced}
    if block is not None:
        state |= {prefix + name: value for name, value in block.weights().items()}
    assign_weights(model, state)
    model.model.embed_tokens.computes_in = parent.model.embed_tokens.computes_in
    return model


def _shape_with(parent: TesseraForCausalLM, layer: int, variant: Variant) -> Shape:
    """The parent's shape but for one sub-block."""
    shape = list(shape_of(parent.config))
    heads, width = shape[layer]
    shape[layer] = (variant.size, width) if variant.part == "attention" else (heads, variant.size)
    return tuple(shape)


def shape_of(config: PretrainedConfig) -> Shape:
    """The attention and the FFN of every layer."""
    return shape_of_architecture(Architecture.from_config(config.to_dict()))


def reshaped(config: PretrainedConfig, shape: Shape) -> TesseraConfig:
    """The same configuration for other layers."""
    values = config.to_dict()
    blocks = tuple(starmap(block_of, shape))
    architecture = Architecture.from_config(values).model_copy(update={"blocks": blocks})
    return model_config({**values, "num_hidden_layers": len(blocks), "block_configs": architecture.block_configs()})
