"""The block library: every variant of every sub-block, trained on its own to reproduce the parent's sub-block.

Decoupled blockwise local distillation: the input of a variant is the parent's activations, its target is the output of
the parent's sub-block. No gradient passes from one variant to another, so one forward pass of the parent serves them
all. The parent's own sub-blocks and the no-ops need no training.

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
    """The layers of shard `index` of `count`: every `count`-th, so that shards take equally long."""
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
    """Train variants in one pass over the text, and write them.

    A parent in memory takes one batch at a time through all layers. A paged parent takes all batches through a layer
    before the next layer is read, and only the variants of that layer are in memory. The results are the same.

    Args:
        parent: frozen; the teacher.
        keys: the variants.
        make: initialises a variant.
        folder: the weights are written there.
        stream: packed training text.
        batch_size: packed rows a step.
        config: steps, learning rate, and the error below which a variant is not trained.
        context: takes progress, stores resume points, and tells when the stage must stop.

    Returns:
        The normalised error of each variant, one for each training step.

    Raises:
        Interrupted: the stage was asked to stop; a checkpoint was saved.
    """
    trainer = BlockTrainer(keys, make, folder, config, context)
    paged = is_paged(parent.model.layers)
    steps_at_once = config.num_steps if paged else 1
    for first in range(0, config.num_steps if keys else 0, steps_at_once):
        if not trainer.is_behind(first + steps_at_once):
            continue
        batches = [stream.batch(step * batch_size, batch_size) for step in range(first, first + steps_at_once)]
        for layer, number, ios in iterate_layers(parent, batches, trainer.layers[-1] + 1, context):
            if trainer.is_next(layer, first + number):
                trainer.train_step(layer, first + number, ios, batches[number].segment_ids_BT > 0)
            if paged and layer in trainer.layers and number == len(batches) - 1:
                trainer.finish_layer(layer)
                context.progress(len(trainer.finished), len(trainer.layers), WHAT, error=trainer.mean_error())
        if not paged:
            context.progress(first + 1, config.num_steps, WHAT, error=trainer.mean_error())
    for layer in trainer.layers:
        trainer.finish_layer(layer)
    return trainer.errors
