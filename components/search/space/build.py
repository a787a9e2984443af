"""Builds variants of sub-blocks as modules, and models of a given shape."""

from itertools import starmap

import torch
from transformers import PretrainedConfig

from components.core.model.architecture import Architecture
from components.core.model.checkpoint import assign_weights, model_config
from components.core.model.decoder import DecoderLayer, TesseraConfig, TesseraForCausalLM
from components.core.model.layer_numbering import LAYERS
from components.search.space.layer_space import Shape, Variant, block_of
from components.search.space.layer_space import shape_of as shape_of_architecture
from components.search.space.library_files import BlockKey
from components.search.space.subblock import Subblock
from components.search.space.variant_weights import Weights, subblock_weights


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
        training: own a copy of them in float32 that can be trained; else these very tensors.
    """
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
