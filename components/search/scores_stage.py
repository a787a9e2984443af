"""The stage that scores every alternative sub-block of a share of the layers."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from components.core.job import Job
from components.search.assemble import build_subblock, shape_of
from components.search.blocks import BlockKey, load_block
from components.search.calibration import calibration_batches, load_parent
from components.search.config import ScoresConfig
from components.search.library import shard_layers
from components.search.results import SCORES_FILE, write_record
from components.search.score_table import shard_scores
from components.search.scoring import score_replacements
from components.search.space import PARTS, layer_spaces
from components.search.subblock import Subblock


def scores(
    config: ScoresConfig, *, job: Job, out: Path, parent: Path, corpus: Path, library: Path
) -> dict[str, JsonValue]:
    """Replace-one-block scores of a share of the layers. Source: arXiv 2411.19146, section 4.2."""
    return score_blocks(config, [library], job=job, out=out, parent=parent, corpus=corpus)


def score_blocks(
    config: ScoresConfig, libraries: Sequence[Path], *, job: Job, out: Path, parent: Path, corpus: Path
) -> dict[str, JsonValue]:
    """The same, the trained sub-blocks spread over several libraries."""
    model = load_parent(parent, job, config.dtype)
    spaces = layer_spaces(config, shape_of(model.config))
    replacements: dict[BlockKey, Subblock | None] = {
        (layer, variant): None
        if variant.is_no_op
        else build_subblock(model, layer, variant, load_block(libraries, (layer, variant)), training=False)
        for layer in shard_layers(len(spaces), *config.shard_index)
        for part in PARTS
        for variant in spaces[layer].of(part)[1:]
    }
    held_out = calibration_batches(config, corpus, parent, "validation", config.scoring_batches)
    found = score_replacements(model, replacements, held_out, job, seconds=config.scoring_seconds)
    table = shard_scores(found)
    write_record(out / "scores" / SCORES_FILE, table)
    return {
        "scored": len(table.blocks),
        "mean_kl": statistics.fmean(block.kl for block in table.blocks),
        "flop_share": found.flops.share,
        "scoring_s": found.seconds,
    }
