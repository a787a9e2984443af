"""Scores as they are written: `scores.json` of a shard."""

import numpy as np

from components.search.blocks import BlockKey
from components.search.config import MEASURES, Measure
from components.search.noise import standard_error
from components.search.results import BlockScore, ShardScores
from components.search.scoring import Scores

DIGITS = 9
"""Of row sums: finer than their float32 beginnings, and short in JSON."""


def shard_scores(scores: Scores) -> ShardScores:
    """Means, standard errors and row sums of every variant, in the order they were given."""
    return ShardScores(
        tokens=int(scores.tokens_R.sum()),
        row_tokens=tuple(scores.tokens_R.tolist()),
        blocks=tuple(_block_score(scores, key) for key in scores.sums),
        flops=scores.flops.spent,
        naive_flops=scores.flops.naive,
    )


def _block_score(scores: Scores, key: BlockKey) -> BlockScore:
    """One variant; the KL of one that was dropped is what it is at least, over all rows."""
    layer, variant = key
    sums_RM = scores.sums[key].numpy()
    tokens_R = scores.tokens_R[: len(sums_RM)].numpy().astype(np.float64)
    dropped = len(sums_RM) < len(scores.tokens_R)
    means_M = sums_RM.sum(axis=0) / tokens_R.sum()
    means: dict[Measure, float] = dict(zip(MEASURES, means_M.tolist(), strict=True))
    if dropped:
        means["kl"] *= float(tokens_R.sum() / scores.tokens_R.sum())
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
        dropped=dropped,
    )
