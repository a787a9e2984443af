"""`scores.json` of one shard: what was measured of every sub-block, with its standard error. Light: no torch."""

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from components.core.base.config import Config
from components.core.base.errors import InputError
from components.search.config import Measure
from components.search.space.library_table import TrainedBlock

SCORES_FILE = "scores.json"


class BlockScore(TrainedBlock):
    """One alternative sub-block; None for what was not measured."""

    kl: float | None = None
    """KL(parent || parent with this one sub-block replaced), nats a token."""
    lm_loss: float | None = None
    """What the next-token loss grows by, nats a token; below 0 where it falls."""
    cosine: float | None = None
    """1 - cos of the last hidden states, mean over tokens."""
    top1: float | None = None
    """Share of tokens that become another one where the likeliest is taken."""
    accuracy: float | None = None
    """Share of the task set's problems that the parent solves, less the share that is solved with this sub-block."""
    errors: dict[Measure, float] = Field(default_factory=dict)
    """Standard error of each measure, rows of text and problems being what was sampled; none from a single one."""
    row_sums: dict[Measure, tuple[float, ...]] = Field(default_factory=dict)
    """Each measure summed over the tokens of each row, `accuracy` of each problem; left out of `search.json`."""

    def of(self, measure: Measure) -> float:
        """One of the measures.

        Raises:
            InputError: it was not measured.
        """
        value: float | None = getattr(self, measure)
        if value is None:
            raise InputError(
                f"scores.json has no {measure} of layer {self.layer}'s {self.part}-{self.size}",
                hint="score again with search.task.num_problems"
                if measure == "accuracy"
                else f"score again with search.score={measure}",
            )
        return value


class ShardScores(Config):
    """`scores.json` of one shard."""

    tokens: int
    """Held-out tokens that the measures are averaged over."""
    row_tokens: tuple[int, ...] = ()
    """Those of each row."""
    parent_accuracy: float | None = None
    """Share of the task set's problems that the parent solves; None without a task set."""
    blocks: tuple[BlockScore, ...]
    """Every alternative sub-block of the shard's layers."""


Rows = NDArray[np.float64]


def standard_error(sums_R: Rows, tokens_R: Rows) -> float | None:
    """Of the mean over all positions, the ratio of two sums over rows; None where there are fewer than two rows.

    sqrt(R / (R - 1) * sum_r (s_r - mean * n_r)^2) / sum_r n_r.

    Source: Cochran, Sampling Techniques, section 6.4 (variance of a ratio estimate).
    """
    if len(sums_R) < 2:
        return None
    deviations_R = sums_R - sums_R.sum() / tokens_R.sum() * tokens_R
    return float(math.sqrt(len(sums_R) / (len(sums_R) - 1) * (deviations_R**2).sum()) / tokens_R.sum())
