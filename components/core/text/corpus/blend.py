"""Interleaves the samples of several corpora by weight, exactly, and addressed by the global count of samples."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from components.core.base.errors import DataError

MAX_PERIOD = 1 << 20
"""Most samples after which the order of the corpora repeats."""


class Blend:
    """Says from which corpus each sample is, and which sample of that corpus it is.

    After any n samples, each corpus has given within one of n times its weight. The order repeats after as many
    samples as the weights have parts: weights of 0.7 and 0.3 repeat after ten.

    Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Compute one period.

        Raises:
            DataError: a weight is not positive, or the weights have too many digits.
        """
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise DataError(f"weights {list(weights)} of a blend are not all positive", hint="leave such a corpus out")
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        parts = [int(weight * scale) for weight in exact]
        self.parts = [part // math.gcd(*parts) for part in parts]
        self.period = sum(self.parts)
        if self.period > MAX_PERIOD:
            raise DataError(
                f"weights {list(weights)} of a blend repeat only after {self.period:,} samples",
                hint="round them to three digits",
            )
        self._corpus = _assign(self.parts, self.period)
        self._earlier = np.zeros(self.period, dtype=np.int64)
        for corpus in range(len(self.parts)):
            own = np.flatnonzero(self._corpus == corpus)
            self._earlier[own] = np.arange(len(own))

    def locate(self, sample: int) -> tuple[int, int]:
        """The corpus of a sample, and the number of the sample within it."""
        cycles, at = divmod(sample, self.period)
        corpus = int(self._corpus[at])
        return corpus, cycles * self.parts[corpus] + int(self._earlier[at])

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first samples are from each corpus."""
        cycles, rest = divmod(num_samples, self.period)
        found = np.bincount(self._corpus[:rest], minlength=len(self.parts))
        return [cycles * part + int(more) for part, more in zip(self.parts, found, strict=True)]

    def longest(self, limits: Sequence[int]) -> int:
        """Most samples that take no more from each corpus than its limit."""
        low, high = 0, self.period * (1 + min(limit // part for limit, part in zip(limits, self.parts, strict=True)))
        while low < high:  # invariant: `low` samples fit, more than `high` do not
            middle = (low + high + 1) // 2
            fits = all(count <= limit for count, limit in zip(self.counts(middle), limits, strict=True))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _assign(parts: Sequence[int], period: int) -> NDArray[np.int64]:
    """The corpus of each sample of a period.

    Of the corpora that are behind by at least 1 / (2k - 2) samples, k being their number, the one whose next sample is
    due first comes next; then none is ever ahead or behind by more than 1 - 1 / (2k - 2).
    """
    assigned = np.zeros(period, dtype=np.int64)
    if len(parts) == 1:
        return assigned
    double = 2 * len(parts) - 2
    behind = [0] * len(parts)
    """How many samples each corpus is behind, times the period."""
    for sample in range(period):
        behind = [have + part for have, part in zip(behind, parts, strict=True)]
        waiting = (corpus for corpus, have in enumerate(behind) if have * double >= period)
        assigned[sample] = corpus = min(
            waiting, key=lambda corpus: (period * (double - 1) - behind[corpus] * double) / parts[corpus]
        )
        behind[corpus] -= period
    return assigned
