"""Which problems a batch holds: by pass rate, from easy to hard. Source: arXiv 2505.00949, section 5.1."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 10
WIDTH = 0.2
"""Standard deviation of the Gaussian over pass rates; the paper does not say which it has."""


def order_problems(
    pass_rates: Sequence[float], *, batch_size: int, num_batches: int, seed: int, width: float = WIDTH
) -> list[list[int]]:
    """Problem numbers of each batch.

    A batch aims at a Gaussian over pass rates whose centre moves from the highest rate to the lowest; what a bin has
    not left comes from the fullest bins. When all problems were used the pools are filled anew.

    Args:
        pass_rates: of each problem, 0 to 1.
        batch_size: problems a batch.
        num_batches: batches to plan.
        seed: order within bins and batches.
        width: standard deviation of the Gaussian, in pass rate.

    Returns:
        `num_batches` lists of `batch_size` numbers.
    """
    random = np.random.default_rng(seed)
    rates = np.asarray(pass_rates, dtype=np.float64)
    bins = np.minimum((rates * NUM_BINS).astype(int), NUM_BINS - 1)
    pools = _pools(bins, random)
    batches = []
    for centre in np.linspace(rates.max(), rates.min(), num_batches):
        target = _target(centre, width, batch_size)
        batch: list[int] = []
        for number in range(NUM_BINS):
            batch += [pools[number].pop() for _ in range(min(target[number], len(pools[number])))]
        while len(batch) < batch_size:
            fullest = max(range(NUM_BINS), key=lambda k: len(pools[k]))
            if not pools[fullest]:
                pools = _pools(bins, random)
                continue
            batch.append(pools[fullest].pop())
        batches.append([int(i) for i in random.permutation(batch)])
    return batches


def _pools(bins: NDArray[np.int_], random: np.random.Generator) -> list[list[int]]:
    """Problem numbers of each bin, shuffled."""
    return [[int(i) for i in random.permutation(np.flatnonzero(bins == number))] for number in range(NUM_BINS)]


def _target(centre: float, width: float, batch_size: int) -> list[int]:
    """How many problems of each bin a batch aims at; rounded so that they sum to at most `batch_size`."""
    middles = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    weight = np.exp(-0.5 * ((middles - centre) / width) ** 2)
    return [int(count) for count in np.floor(batch_size * weight / weight.sum())]
