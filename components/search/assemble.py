"""From a choice of sub-blocks to a child: weights from the parent and the library, FFN runs fused, a model folder."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import starmap
from pathlib import Path

import torch
from torch import nn

from components.core.architecture import Architecture
from components.core.checkpoint import model_config, take_weights
from components.core.hugging_face import PretrainedConfig
from components.core.model import DecoderLayer, TesseraConfig, TesseraForCausalLM
from components.core.numbering import LAYERS
from components.core.paging import is_paged, page_layers, state_outside_layers
from components.search.blocks import BlockKey, load_block
from components.search.fusion import ChildLayer
from components.search.space import PARTS, LayerSpace, Shape, Variant, block_of
from components.search.space import shape_of as shape_of_architecture
from components.search.subblock import Subblock
from components.search.variants import Weights, subblock_weights


def child_layers(
    parent: TesseraForCausalLM,
    spaces: Sequence[LayerSpace],
    libraries: Sequence[Path],
    variants: Sequence[tuple[Variant, Variant]],
) -> list[ChildLayer]:
    """The layers of a child, one for each of the parent's, not fused yet.

    Args:
        parent: source of every sub-block that stays.
        spaces: options of each layer.
        libraries: folders with the trained variants.
        variants: chosen attention and FFN of each layer.
    """

    def read(number: int) -> Weights:
        weights: Weights = {}
        for part, variant in zip(PARTS, variants[number], strict=True):
            if variant == spaces[number].of(part)[0]:
                weights |= subblock_weights(parent.model.layers[number].state_dict(), part)
            elif not variant.is_no_op:
                weights |= load_block(libraries, (number, variant))
        return weights

    return [
        ChildLayer(attention.size, ffn.size, partial(read, number), (number,))
        for number, (attention, ffn) in enumerate(variants)
    ]


def assemble(parent: TesseraForCausalLM, layers: Sequence[ChildLayer]) -> TesseraForCausalLM:
    """A model of these layers between the parent's embeddings and head, to be used as it is; see `trainable`.

    It shares the parent's weights, copies none, and is paged where the parent is. Its configuration says in
    `parent_layers`, for each layer, how many layers of the parent are behind its output.
    """
    shape = tuple((layer.num_key_value_heads, layer.intermediate_size) for layer in layers)
    with torch.device("meta"):
        child = heterogeneous_model(parent.config, shape)
    child.requires_grad_(False)
    state = state_outside_layers(parent)
    paged = is_paged(parent.model.layers)
    if paged:
        page_layers(child.model.layers, lambda number: layers[number].read())
    else:
        for number, layer in enumerate(layers):
            state |= {f"{LAYERS}{number}.{name}": tensor for name, tensor in layer.read().items()}
    take_weights(child, state, strict=not paged)
    child.config.parent_layers = _depths([layer.parent_layers for layer in layers], len(parent.model.layers))
    return child


def trainable(child: TesseraForCausalLM) -> TesseraForCausalLM:
    """A copy in float32, so that whoever trains it leaves the parent alone.

    Args:
        child: not paged.
    """
    copy = deepcopy(child).requires_grad_(True)
    nn.Module.to(copy, torch.float32)
    return copy


def _depths(parent_layers: Sequence[Sequence[int]], depth: int) -> list[int]:
    """For each layer of a child, how many of the parent's are behind its output.

    What was dropped passes its input on, so the output is also that of the dropped layers which follow.
    """
    depths, done = [], 0
    for numbers in parent_layers:
        done = max(done, numbers[-1] + 1)
        depths.append(min((later[0] for later in parent_layers if later[0] >= done), default=depth))
    return depths


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
    take_weights(model, state)
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
