"""Quantiles of the normal distribution, by which confidence intervals are made.

Their values are those of mathematics, so stages may use them although the code digest leaves this package out.
"""

import statistics


def quantile(confidence: float) -> float:
    """Two-sided quantile: a normal variable is within so many standard deviations with this probability."""
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)


Z_95 = quantile(0.95)
"""About 1.96."""
