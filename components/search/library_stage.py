"""The stage that trains the block library of a share of the layers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from components.core.batches import PackedStream, load_corpus
from components.core.job import Job
from components.search.assemble import build_subblock, shape_of
from components.search.blocks import BlockKey, load_block
from components.search.calibration import load_parent
from components.search.config import LibraryConfig
from components.search.importance import load_importance
from components.search.library import distil, shard_layers, variants_to_train
from components.search.linear_fit import fit_linear
from components.search.results import LIBRARY_FILE, ShardLibrary, TrainedBlock, write_record
from components.search.space import layer_spaces
from components.search.subblock import Subblock
from components.search.variants import initialise, subblock_weights


def library(
    config: LibraryConfig, *, job: Job, out: Path, parent: Path, corpus: Path, importance: Path
) -> dict[str, JsonValue]:
    """Blockwise local distillation of a share of the layers. Source: arXiv 2411.19146, section 3."""
    model = load_parent(parent, job, config.dtype)
    spaces = layer_spaces(config, shape_of(model.config))
    contributions = load_importance(importance)
    keys = variants_to_train(spaces, shard_layers(len(spaces), *config.shard_index))

    stream = PackedStream(load_corpus(corpus, parent, "train"), config.seq_len, config.seed or 0)
    fitted = job.scratch / "linear"
    num_batches = config.distillation.linear_batches if any(variant.is_linear for _, variant in keys) else 0
    firsts = range(0, num_batches * config.batch_size, config.batch_size)
    fit_linear(model, keys, [stream.batch(first, config.batch_size) for first in firsts], fitted, job)

    def make(key: BlockKey) -> Subblock:
        layer, variant = key
        if variant.is_linear and config.distillation.linear_batches:
            return build_subblock(model, layer, variant, load_block([fitted], key))
        own = subblock_weights(model.model.layers[layer].state_dict(), variant.part)
        weights = initialise(own, variant, importance_I=contributions.get(layer), head_dim=model.config.head_dim)
        return build_subblock(model, layer, variant, weights)

    errors = distil(model, keys, make, out / "library", stream, config.batch_size, config.distillation, job)
    blocks = tuple(
        TrainedBlock(layer=layer, part=variant.part, size=variant.size, **_errors(errors[layer, variant]))
        for layer, variant in keys
    )
    write_record(out / "library" / LIBRARY_FILE, ShardLibrary(blocks=blocks))
    last = [block.last_error for block in blocks if block.last_error is not None]
    return {"trained": len(blocks), "mean_error": statistics.fmean(last) if last else None}


def _errors(history: Sequence[float]) -> dict[str, Any]:
    """What is told of the training of a block; nothing of one that was not trained."""
    if not history:
        return {}
    last = statistics.fmean(history[-max(1, len(history) // 10) :])
    return {"first_error": history[0], "last_error": last, "steps": len(history)}
