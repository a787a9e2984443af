"""The stage that scores every alternative sub-block of a share of the layers."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from components.core.base.errors import InputError
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.runtime.resume import Resume
from components.search.config import ScoresConfig
from components.search.library.calibration import calibration_batches, load_parent
from components.search.library.local_distillation import shard_layers
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
    problems: Path | None = None,
) -> dict[str, JsonValue]:
    """Replace-one-block scores of a share of the layers. Source: arXiv 2411.19146, section 4.2."""
    return score_blocks(config, [library], context=context, out=out, parent=parent, corpus=corpus, problems=problems)


def score_blocks(
    config: ScoresConfig,
    libraries: Sequence[Path],
    *,
    context: StageContext,
    out: Path,
    parent: Path,
    corpus: Path,
    problems: Path | None = None,
) -> dict[str, JsonValue]:
    """The same with the trained sub-blocks spread over several libraries."""
    tasks = _tasks(config, problems, parent)
    model = load_parent(parent, context, config.dtype)
    spaces = layer_spaces(config, shape_of(model.config))
    replacements = _replacements(model, spaces, shard_layers(len(spaces), *config.shard_index), libraries)
    held_out = calibration_batches(config, corpus, parent, "validation", config.scoring_batches)
    measured = score_replacements(model, replacements, held_out, context)
    solved = None
    if tasks is not None:
        points = Resume(context.resume.folder / "accuracy", context.resume.interval_s)
        solved = solve_replaced(model, replacements, tasks, dataclasses.replace(context, resume=points))
    table = shard_scores(measured, solved)
    write_record(out / "scores" / SCORES_FILE, table)
    return {"scored": len(table.blocks), "mean_kl": statistics.fmean(block.kl for block in table.blocks)}


def _replacements(
    parent: TesseraForCausalLM, spaces: Sequence[LayerSpace], layers: Sequence[int], libraries: Sequence[Path]
) -> dict[BlockKey, Subblock | None]:
    """Every variant of these layers but the parent's own; None is the no-op."""
    return {
        (layer, variant): None
        if variant.is_no_op
        else build_subblock(parent, layer, variant, load_block(libraries, (layer, variant)), training=False)
        for layer in layers
        for part in PARTS
        for variant in spaces[layer].of(part)[1:]
    }


def _tasks(config: ScoresConfig, problems: Path | None, parent: Path) -> Tasks | None:
    """The task set that the settings ask for.

    Raises:
        InputError: there are no problems.
    """
    if not config.task.num_problems:
        return None
    if problems is None:
        raise InputError(
            f"task.num_problems is {config.task.num_problems}, and there are no problems",
            hint="give the input `problems`, a folder with validation.jsonl",
        )
    return load_tasks(config.task, problems, parent)
