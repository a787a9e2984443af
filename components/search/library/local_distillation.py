"""The block library: every variant of every sub-block, trained alone to do what the parent's own does.

Decoupled blockwise local distillation: a variant is fed the parent's own activations and learns the output of the
parent's sub-block, while everything around it stays the parent's. No gradient passes from one variant to another, so
one forward pass of the parent feeds them all. The parent's own sub-blocks and the no-ops need no training.

Source: arXiv 2411.19146, section 3.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from components.core.model.decoder import TesseraForCausalLM
from components.core.model.layer_paging import is_paged
from components.core.runtime.context import StageContext
from components.core.text.packing import PackedStream
from components.search.config import Distillation
from components.search.library.activations import iterate_layers
from components.search.library.block_trainer import BlockTrainer
from components.search.space.layer_space import LayerSpace
from components.search.space.library_files import BlockKey
from components.search.space.subblock import Subblock

WHAT = "block library"


def shard_layers(num_layers: int, index: int, count: int) -> range:
    """The layers of shard `index` of `count`: every `count`-th, so that shards are alike."""
    return range(index, num_layers, count)


def variants_to_train(spaces: Sequence[LayerSpace], layers: Iterable[int]) -> list[BlockKey]:
    """Every variant of these layers that needs weights of its own."""
    return [
        (layer, variant)
        for layer in layers
        for variant in (*spaces[layer].trained("attention"), *spaces[layer].trained("ffn"))
    ]


def distil(
    parent: TesseraForCausalLM,
    keys: Sequence[BlockKey],
    make: Callable[[BlockKey], Subblock],
    folder: Path,
    stream: PackedStream,
    batch_size: int,
    config: Distillation,
    context: StageContext,
) -> dict[BlockKey, list[float]]:
    """Train variants side by side, and write them.

    A parent in memory takes one batch at a time through all layers. A paged one takes all batches through each layer
    before the next is read, and only the variants of that layer are in memory; what comes out is the same.

    Args:
        parent: frozen; feeds and teaches them.
        keys: the variants.
        make: initialises one.
        folder: takes the weights.
        stream: packed training text.
        batch_size: packed rows a step.
        config: steps, learning rate, when to stop.
        context: takes progress, keeps resume points, says when to stop.

    Returns:
        The normalised error of each variant, one for each step that it was taught in.

    Raises:
        Interrupted: the stage was asked to stop; a checkpoint was saved.
    """
    lessons = BlockTrainer(keys, make, folder, config, context)
    paged = is_paged(parent.model.layers)
    at_once = config.num_steps if paged else 1
    for first in range(0, config.num_steps if keys else 0, at_once):
        if not lessons.has_before(first + at_once):
            continue
        batches = [stream.batch(step * batch_size, batch_size) for step in range(first, first + at_once)]
        for layer, number, seen in iterate_layers(parent, batches, lessons.layers[-1] + 1, context):
            if lessons.has(layer, first + number):
                lessons.teach(layer, first + number, seen, batches[number].segment_ids_BT > 0)
            if paged and layer in lessons.layers and number == len(batches) - 1:
                lessons.end(layer)
                context.progress(len(lessons.ended), len(lessons.layers), WHAT, error=lessons.mean_error())
        if not paged:
            context.progress(first + 1, config.num_steps, WHAT, error=lessons.mean_error())
    for layer in lessons.layers:
        lessons.end(layer)
    return lessons.errors
