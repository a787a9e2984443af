"""The stage that trains the block library of a share of the layers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from components.core.runtime.context import StageContext
from components.core.text.packing import PackedStream, load_corpus
from components.search.config import LibraryConfig
from components.search.library.calibration import load_parent
from components.search.library.importance import load_importance
from components.search.library.linear_fit import fit_linear
from components.search.library.local_distillation import distil, shard_layers, variants_to_train
from components.search.library.records import LIBRARY_FILE, ShardLibrary
from components.search.library.warm_start import (
    EarlierBlock,
    begin_from,
    better_starts,
    digest_of_weights,
    earlier_blocks,
)
from components.search.space.build import build_subblock, shape_of
from components.search.space.layer_space import Part, layer_spaces
from components.search.space.library_files import BlockKey, load_block, save_block
from components.search.space.records import Start, TrainedBlock, write_record
from components.search.space.subblock import Subblock
from components.search.space.variant_weights import Weights, initialise, subblock_weights


def library(
    config: LibraryConfig,
    *,
    context: StageContext,
    out: Path,
    parent: Path,
    corpus: Path,
    importance: Path,
    earlier: Path | None = None,
) -> dict[str, JsonValue]:
    """Blockwise local distillation of a share of the layers. Source: arXiv 2411.19146, section 3.

    What an earlier library has trained against the same sub-block is reused, and else begun from where that errs less.
    """
    model = load_parent(parent, context, config.dtype)
    spaces = layer_spaces(config, shape_of(model.config))
    contributions = load_importance(importance)
    keys = variants_to_train(spaces, shard_layers(len(spaces), *config.shard_index))

    def own(layer: int, part: Part) -> Weights:
        return subblock_weights(model.model.layers[layer].state_dict(), part)

    teachers = {place: digest_of_weights(own(*place)) for place in dict.fromkeys((k, v.part) for k, v in keys)}
    known = earlier_blocks(earlier, model.config, keys) if earlier is not None else {}
    reused = {
        (layer, variant): block
        for (layer, variant), block in known.items()
        if block.teacher == teachers[layer, variant.part] and block.num_steps >= config.distillation.num_steps
    }
    left = [key for key in keys if key not in reused]

    stream = PackedStream(load_corpus(corpus, parent, "train"), config.seq_len, config.seed or 0)
    fitted = context.scratch / "linear"
    num_batches = config.distillation.linear_batches if any(variant.is_linear for _, variant in left) else 0
    firsts = range(0, num_batches * config.batch_size, config.batch_size)
    fit_linear(model, left, [stream.batch(first, config.batch_size) for first in firsts], fitted, context)

    def make(key: BlockKey) -> Subblock:
        layer, variant = key
        if variant.is_linear and config.distillation.linear_batches:
            return build_subblock(model, layer, variant, load_block([fitted], key))
        weights = initialise(
            own(layer, variant.part),
            variant,
            importance_I=contributions.get(layer),
            head_dim=model.config.head_dim,
        )
        return build_subblock(model, layer, variant, weights)

    starts = {key: block for key, block in known.items() if key not in reused}
    warm = better_starts(model, make, starts, stream.batch(0, config.batch_size), context)

    def begin(key: BlockKey) -> Subblock:
        return begin_from(make(key), starts[key].weights()) if key in warm else make(key)

    if earlier is not None:
        context.note(
            f"{len(reused)} of {len(keys)} variants are reused from an earlier library, {len(warm)} begin from it, "
            f"{len(left) - len(warm)} from the parent"
        )
    errors = distil(model, left, begin, out / "library", stream, config.batch_size, config.distillation, context)
    for key, block in reused.items():
        save_block(out / "library", key, block.weights())
    blocks = tuple(
        _reused(key, reused[key])
        if key in reused
        else _trained(key, errors[key], "earlier" if key in warm else "parent")
        for key in keys
    )
    record = ShardLibrary(
        blocks=blocks,
        num_layers=len(spaces),
        num_steps=config.distillation.num_steps,
        teachers={f"{layer}/{part}": digest for (layer, part), digest in teachers.items()},
    )
    write_record(out / "library" / LIBRARY_FILE, record)
    last = [block.last_error for block in blocks if block.last_error is not None]
    counts: dict[str, JsonValue] = {"reused": len(reused), "begun_from_earlier": len(warm)} if earlier else {}
    return {"trained": len(left), **counts, "mean_error": statistics.fmean(last) if last else None}


def _reused(key: BlockKey, block: EarlierBlock) -> TrainedBlock:
    """What is told of a variant that an earlier library has trained."""
    return block.told.model_copy(update={"layer": key[0], "start": "reused"})


def _trained(key: BlockKey, history: Sequence[float], start: Start) -> TrainedBlock:
    """What is told of a variant that was trained here."""
    layer, variant = key
    return TrainedBlock(layer=layer, part=variant.part, size=variant.size, start=start, **_errors(history))


def _errors(history: Sequence[float]) -> dict[str, Any]:
    """What is told of the training of a block; nothing of one that was not trained."""
    if not history:
        return {}
    last = statistics.fmean(history[-max(1, len(history) // 10) :])
    return {"first_error": history[0], "last_error": last, "steps": len(history)}
