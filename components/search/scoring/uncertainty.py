"""How well scores are known, and whether a choice between sub-blocks lies within that.

Held-out text is sampled row by row: positions of one row are not independent of each other, rows are. All variants are
scored on the same rows, so that the error of a difference is taken from the differences row by row.

Shape letters: R rows, K slots, J options.
"""

import math

import numpy as np
from numpy.typing import NDArray

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
