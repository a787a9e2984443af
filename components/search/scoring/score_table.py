"""Scores as they are written: `scores.json` of a shard."""

import numpy as np

from components.search.config import MEASURES, TextMeasure
from components.search.scoring.records import BlockScore, ShardScores
from components.search.scoring.replace_one_block import Scores
from components.search.scoring.task_accuracy import Solved
from components.search.scoring.uncertainty import standard_error
from components.search.space.library_files import BlockKey

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
    means: dict[TextMeasure, float] = dict(zip(MEASURES, means_M.tolist(), strict=True))
    errors = {measure: standard_error(sums_RM[:, index], tokens_R) for index, measure in enumerate(MEASURES)}
    return BlockScore(
        layer=layer,
        part=variant.part,
        size=variant.size,
        **means,
        errors={measure: error for measure, error in errors.items() if error is not None},
        row_sums={
            measure: tuple(round(value, DIGITS) for value in sums_RM[:, index].tolist())
            for index, measure in enumerate(MEASURES)
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
