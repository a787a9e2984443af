"""The stages that score FFN channels, and train the block library of a share of the layers."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.packing import RowStream, corpus_stream
from components.search.config import ImportanceConfig, LibraryConfig
from components.search.library.calibration import calibration_batches, load_parent
from components.search.library.initialisation import channel_contributions, fit_linear, load_importance, save_importance
from components.search.library.local_distillation import distil, shard_layers, variants_to_train
from components.search.library.warm_start import (
    EarlierBlock,
    better_starts,
    earlier_blocks,
    reusable_blocks,
    start_from,
    teacher_digests,
)
from components.search.space.layer_space import layer_spaces
from components.search.space.library_table import LIBRARY_FILE, ShardLibrary, Start, TrainedBlock, write_record
from components.search.space.subblocks import (
    BlockKey,
    Subblock,
    build_subblock,
    initialise,
    load_block,
    save_block,
    shape_of,
    subblock_weights,
)


def importance(
    config: ImportanceConfig, *, context: StageContext, out: Path, parent: Path, corpus: Path
) -> dict[str, JsonValue]:
    """Channel importance on calibration text. Source: arXiv 2411.19146, appendix A."""
    model = load_parent(parent, context, config.dtype)
    batches = calibration_batches(config, corpus, parent, "train", config.importance_batches, context)
    contributions = channel_contributions(model, batches, context)
    save_importance(contributions, out / "importance")
    return {"layers": len(contributions)}


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

    A variant that an earlier library trained against the same sub-block is reused. Any other starts from the earlier
    library where its error is smaller there, else from the parent.
    """
    model = load_parent(parent, context, config.dtype)
    spaces = layer_spaces(config, shape_of(model.config))
    keys = variants_to_train(spaces, shard_layers(len(spaces), *config.shard_index))
    teachers = teacher_digests(model, keys)
    known = earlier_blocks(earlier, model.config, keys) if earlier is not None else {}
    reused = reusable_blocks(known, teachers, config.distillation.num_steps)
    to_train = [key for key in keys if key not in reused]

    stream = corpus_stream(corpus, parent, "train", seq_len=config.seq_len, seed=config.seed or 0)
    make = _initialiser(config, model, to_train, stream, importance, context)
    starts = {key: block for key, block in known.items() if key not in reused}
    warm = better_starts(model, make, starts, stream.batch(0, config.batch_size), context)
    if earlier is not None:
        context.note(
            f"{len(reused)} of {len(keys)} variants are reused from an earlier library, {len(warm)} begin from it, "
            f"{len(to_train) - len(warm)} from the parent"
        )

    def begin(key: BlockKey) -> Subblock:
        return start_from(make(key), starts[key].weights()) if key in warm else make(key)

    errors = distil(model, to_train, begin, out / "library", stream, config.batch_size, config.distillation, context)
    for key, block in reused.items():
        save_block(out / "library", key, block.weights())
    blocks = _block_records(keys, reused, warm, errors)
    record = ShardLibrary(
        blocks=blocks,
        num_layers=len(spaces),
        num_steps=config.distillation.num_steps,
        teachers={f"{layer}/{part}": digest for (layer, part), digest in teachers.items()},
    )
    write_record(out / "library" / LIBRARY_FILE, record)
    last = [block.last_error for block in blocks if block.last_error is not None]
    counts: dict[str, JsonValue] = {"reused": len(reused), "begun_from_earlier": len(warm)} if earlier else {}
    return {"trained": len(to_train), **counts, "mean_error": statistics.fmean(last) if last else None}


def _initialiser(
    config: LibraryConfig,
    parent: TesseraForCausalLM,
    keys: Sequence[BlockKey],
    stream: RowStream,
    importance: Path,
    context: StageContext,
) -> Callable[[BlockKey], Subblock]:
    """A function that makes a variant before training; linear variants are fitted here, all in one pass.

    Args:
        config: settings of the stage.
        parent: the weights come from it.
        keys: the variants that will be asked for.
        stream: packed training text.
        importance: contribution of every FFN channel.
        context: gives scratch space for the fitted weights.
    """
    fitted = context.scratch / "linear"
    num_batches = config.distillation.linear_batches if any(variant.is_linear for _, variant in keys) else 0
    firsts = range(0, num_batches * config.batch_size, config.batch_size)
    fit_linear(parent, keys, [stream.batch(first, config.batch_size) for first in firsts], fitted, context)
    contributions = load_importance(importance)

    def make(key: BlockKey) -> Subblock:
        layer, variant = key
        if variant.is_linear and config.distillation.linear_batches:
            return build_subblock(parent, layer, variant, load_block([fitted], key))
        own = subblock_weights(parent.model.layers[layer].state_dict(), variant.part)
        importance_I = contributions.get(layer)
        weights = initialise(own, variant, importance_I=importance_I, head_dim=parent.config.head_dim)
        return build_subblock(parent, layer, variant, weights)

    return make


def _block_records(
    keys: Sequence[BlockKey],
    reused: Mapping[BlockKey, EarlierBlock],
    warm: set[BlockKey],
    errors: Mapping[BlockKey, Sequence[float]],
) -> tuple[TrainedBlock, ...]:
    """One record a variant: how it started, and its errors in training."""

    def record(key: BlockKey) -> TrainedBlock:
        layer, variant = key
        if key in reused:
            return reused[key].record.model_copy(update={"layer": layer, "start": "reused"})
        start: Start = "earlier" if key in warm else "parent"
        return TrainedBlock(layer=layer, part=variant.part, size=variant.size, start=start, **_errors(errors[key]))

    return tuple(record(key) for key in keys)


def _errors(history: Sequence[float]) -> dict[str, Any]:
    """First and last error of a training, and its steps; empty without training."""
    if not history:
        return {}
    last = statistics.fmean(history[-max(1, len(history) // 10) :])
    return {"first_error": history[0], "last_error": last, "steps": len(history)}
