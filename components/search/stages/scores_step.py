"""The stage that scores every alternative sub-block of a share of the layers."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from components.core.base.errors import InputError
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.runtime.resume import Resume
from components.search.config import ScoresConfig
from components.search.costs.measured import own_costs_of
from components.search.costs.resources import RESOURCES
from components.search.library.calibration import calibration_batches, load_parent
from components.search.library.local_distillation import shard_layers
from components.search.scoring.dominance import VariantCosts, score_undominated
from components.search.scoring.records import SCORES_FILE
from components.search.scoring.replace_one_block import score_replacements
from components.search.scoring.score_table import shard_scores
from components.search.scoring.task_accuracy import Tasks, load_tasks, solve_replaced
from components.search.space.build import build_subblock, shape_of
from components.search.space.layer_space import PARTS, LayerSpace, layer_spaces
from components.search.space.library_files import BlockKey, load_block
from components.search.space.records import write_record
from components.search.space.subblock import Subblock


def scores(
    config: ScoresConfig,
    *,
    context: StageContext,
    out: Path,
    parent: Path,
    corpus: Path,
    library: Path,
    costs: Path | None = None,
    problems: Path | None = None,
) -> dict[str, JsonValue]:
    """Replace-one-block scores of a share of the layers. Source: arXiv 2411.19146, section 4.2."""
    read: dict[str, Any] = {"parent": parent, "corpus": corpus, "costs": costs, "problems": problems}
    return score_blocks(config, [library], context=context, out=out, **read)


def score_blocks(
    config: ScoresConfig,
    libraries: Sequence[Path],
    *,
    context: StageContext,
    out: Path,
    parent: Path,
    corpus: Path,
    costs: Path | None = None,
    problems: Path | None = None,
) -> dict[str, JsonValue]:
    """The same, the trained sub-blocks spread over several libraries."""
    tasks = _tasks(config, problems, parent)
    model = load_parent(parent, context, config.dtype)
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
    if config.drop_dominated:
        known = _known_costs(model, spaces, costs)
        needed = {key for key in replacements if key[1] in spaces[key[0]].fixed}
        found = score_undominated(model, replacements, held_out, context, costs=known, needed=needed)
    else:
        found = score_replacements(model, replacements, held_out, context, seconds=config.scoring_seconds)
    points = Resume(context.resume.folder / "accuracy", context.resume.interval_s)
    asking = dataclasses.replace(context, resume=points)
    solved = None if tasks is None else solve_replaced(model, replacements, tasks, asking)
    table = shard_scores(found, solved)
    write_record(out / "scores" / SCORES_FILE, table)
    return {
        "scored": len(table.blocks),
        "mean_kl": statistics.fmean(block.kl for block in table.blocks),
        "flop_share": found.flops.share,
        "scoring_s": found.seconds,
    }


def _tasks(config: ScoresConfig, problems: Path | None, parent: Path) -> Tasks | None:
    """The task set that the settings ask for."""
    if not config.task.num_problems:
        return None
    if problems is None:
        raise InputError(
            f"task.num_problems is {config.task.num_problems}, and there are no problems",
            hint="give the input `problems`, a folder with validation.jsonl",
        )
    return load_tasks(config.task, problems, parent)


def _known_costs(model: TesseraForCausalLM, spaces: Sequence[LayerSpace], costs: Path | None) -> VariantCosts:
    """Everything that may be limited, of every variant and of the parent's own sub-blocks."""
    if costs is None:
        raise InputError("drop_dominated goes by what sub-blocks cost", hint="give the input `costs`, a costs.json")
    blocks = own_costs_of(model, spaces, costs).blocks
    return {
        (layer, variant): tuple(blocks[variant.name].of(resource) for resource in RESOURCES)
        for layer, space in enumerate(spaces)
        for part in PARTS
        for variant in space.of(part)
    }
