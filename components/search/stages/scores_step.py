"""The stage that scores every alternative sub-block of a share of the layers."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from components.core.base.errors import InputError
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.runtime.resume import Resume
from components.search.config import ScoresConfig
from components.search.library.calibration import calibration_batches, load_parent
from components.search.library.local_distillation import shard_layers
from components.search.scoring.replace_one_block import Scores, score_replacements
from components.search.scoring.score_table import SCORES_FILE, BlockScore, ShardScores, standard_error
from components.search.scoring.task_accuracy import Solved, Tasks, load_tasks, solve_replaced
from components.search.space.layer_space import PARTS, LayerSpace, layer_spaces
from components.search.space.library_table import write_record
from components.search.space.subblocks import BlockKey, Subblock, build_subblock, load_block, shape_of


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
    held_out = calibration_batches(config, corpus, parent, "validation", config.scoring_batches, context)
    measure = config.text_measure
    measured = score_replacements(model, replacements, held_out, [measure], context)
    solved = None
    if tasks is not None:
        points = Resume(context.resume.folder / "accuracy", context.resume.interval_s)
        solved = solve_replaced(model, replacements, tasks, dataclasses.replace(context, resume=points))
    table = shard_scores(measured, solved)
    write_record(out / "scores" / SCORES_FILE, table)
    mean = statistics.fmean(block.of(measure) for block in table.blocks)
    return {"scored": len(table.blocks), f"mean_{measure}": mean}


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


DIGITS = 9
"""Of row sums: finer than their float32 beginnings, and short in JSON."""


def shard_scores(scores: Scores, solved: Solved | None = None) -> ShardScores:
    """Means, standard errors and row sums of every variant, in the order they were given."""
    blocks = [_block_score(scores, key) for key in scores.sums]
    if solved is not None:
        blocks = [_with_accuracy(block, solved, key) for block, key in zip(blocks, scores.sums, strict=True)]
    return ShardScores(
        tokens=int(scores.tokens_R.sum()),
        row_tokens=tuple(scores.tokens_R.tolist()),
        parent_accuracy=None if solved is None else float(np.mean(solved.parent)),
        blocks=tuple(blocks),
    )


def _block_score(scores: Scores, key: BlockKey) -> BlockScore:
    """Means, standard errors and row sums of one variant."""
    layer, variant = key
    sums_RM = scores.sums[key].numpy()
    tokens_R = scores.tokens_R.numpy().astype(np.float64)
    means_M = sums_RM.sum(axis=0) / tokens_R.sum()
    columns = list(enumerate(scores.measures))
    errors = {measure: standard_error(sums_RM[:, index], tokens_R) for index, measure in columns}
    return BlockScore(
        layer=layer,
        part=variant.part,
        size=variant.size,
        **dict(zip(scores.measures, means_M.tolist(), strict=True)),
        errors={measure: error for measure, error in errors.items() if error is not None},
        row_sums={
            measure: tuple(round(value, DIGITS) for value in sums_RM[:, index].tolist()) for index, measure in columns
        },
    )


def _with_accuracy(block: BlockScore, solved: Solved, key: BlockKey) -> BlockScore:
    """The same with the problems that are lost: 1 a problem, -1 where it is the parent that fails."""
    lost_R = np.subtract(solved.parent, solved.variants[key], dtype=np.float64)
    error = standard_error(lost_R, np.ones_like(lost_R))
    return block.model_copy(
        update={
            "accuracy": float(lost_R.mean()),
            "errors": block.errors | ({} if error is None else {"accuracy": error}),
            "row_sums": block.row_sums | {"accuracy": tuple(lost_R.tolist())},
        }
    )
