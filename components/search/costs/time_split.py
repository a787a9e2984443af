"""Times of whole models, split into a fixed part and a part for each sub-block, none cheaper than a smaller one.

A sub-block with fewer KV heads or fewer channels does a part of the work of the larger one, so its true cost is not
higher. Measured times say otherwise at times: through noise, then measuring again helps (`contradictions` names the
models), or because a kernel pads odd sizes or has no fast path for them. The split keeps to the maths in both cases:
the cost of a size is the sum of non-negative increments over all smaller sizes. An odd size that truly is slower than
the next larger one then gets the same cost as that one, between the two measured times, so the search has no reason to
choose it for its speed. The measured times of both models are in `costs.json` next to what the parts add up to.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.optimize import nnls

from components.search.space.layer_space import Shape, Size, Variant

BEYOND_NOISE = 2.0
"""Standard errors of a difference of two medians from which it is no noise."""
MEDIAN_ERROR = 1.4826 * math.sqrt(math.pi / 2)
"""Standard error of the median of n normal values, from their median absolute deviation, times the root of n."""


@dataclass(frozen=True)
class TimeSplit:
    """Times of models as a fixed part (None) and a part for each sub-block.

    Attributes:
        parts: from the median of each model, milliseconds.
        spread: of each part, when every measurement is explained by itself, milliseconds.
        medians: of each model, milliseconds.
        totals: what the parts of each model add up to, milliseconds.
    """

    parts: dict[Variant | None, float]
    spread: dict[Variant | None, float]
    medians: list[float]
    totals: list[float]

    @classmethod
    def of(cls, shapes: Sequence[Shape], times_ms: Sequence[Sequence[float]]) -> Self:
        """Explain the measurements of models, those of all but the first at the first's pace.

        A model that was measured in fewer rounds than another counts with its median in the others.
        """
        medians = [statistics.median(model) for model in times_ms]
        fixed, parts, totals = split_times(shapes, medians)
        others = list(zip(medians, times_ms, strict=True))[1:]
        each = [
            split_times(
                shapes, [medians[0], *(model[number] if number < len(model) else median for median, model in others)]
            )
            for number in range(max(len(model) for model in times_ms[1:]))
        ]
        spread: dict[Variant | None, float] = {None: _range([fixed for fixed, _, _ in each])}
        spread |= {variant: _range([parts[variant] for _, parts, _ in each]) for variant in parts}
        return cls(dict[Variant | None, float]([(None, fixed), *parts.items()]), spread, medians, totals)


def split_times(shapes: Sequence[Shape], step_ms: Sequence[float]) -> tuple[float, dict[Variant, float], list[float]]:
    """Split the time of models into a fixed part and a part for each sub-block, none below 0 or a smaller one's.

    Non-negative least squares of relative errors, so that fast models count as much as slow ones. The unknowns are the
    fixed part, each linear sub-block, and what each size takes more than the next smaller one.

    Returns:
        The fixed part, the part of each variant, and what they add up to for each model, milliseconds.
    """
    rows = [[Variant("attention", heads) for heads, _ in s] + [Variant("ffn", width) for _, width in s] for s in shapes]
    variants = sorted({variant for row in rows for variant in row if not variant.is_no_op})
    includes = np.array([[_includes(larger, smaller) for smaller in variants] for larger in variants], dtype=float)
    counts = np.array([[1.0, *(row.count(variant) for variant in variants)] for row in rows])
    times = np.array(step_ms)
    of_increments = np.hstack([counts[:, :1], counts[:, 1:] @ includes])
    increments, _ = nnls(of_increments / times[:, None], np.ones(len(times)))
    parts: list[float] = (includes @ increments[1:]).tolist()
    explained: list[float] = (of_increments @ increments).tolist()
    return float(increments[0]), dict(zip(variants, parts, strict=True)), explained


def contradictions(shapes: Sequence[Shape], times_ms: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs of models whose times contradict their sizes beyond the noise of their rounds.

    Args:
        shapes: of the models.
        times_ms: of each model in its rounds; all but the first at the first's pace, which therefore has no noise.

    Returns:
        Numbers of a smaller and of a larger model, of which the smaller has the larger median.
    """
    medians = [statistics.median(model) for model in times_ms]
    errors = [0.0, *(_median_error(model) for model in times_ms[1:])]
    return [
        (small, large)
        for small, smaller in enumerate(shapes)
        for large, larger in enumerate(shapes)
        if _is_part_of(smaller, larger)
        and medians[small] - medians[large] > BEYOND_NOISE * math.hypot(errors[small], errors[large])
    ]


def _is_part_of(smaller: Shape, larger: Shape) -> bool:
    """Whether no sub-block is larger than the other model's in the same place, and one is smaller."""
    pairs = [(one, other) for layers in zip(smaller, larger, strict=True) for one, other in zip(*layers, strict=True)]
    return smaller != larger and all(_at_most(one, other) for one, other in pairs)


def _at_most(one: Size, other: Size) -> bool:
    """Whether a size does no more than another. Of different kinds only the no-op is known to."""
    if isinstance(one, int) and isinstance(other, int):
        return one <= other
    return one in (0, other)


def _includes(larger: Variant, smaller: Variant) -> bool:
    """Whether a sub-block does all that another one of its kind does."""
    return smaller.part == larger.part and smaller.is_linear == larger.is_linear and smaller.count <= larger.count


def _median_error(values: Sequence[float]) -> float:
    """Standard error of the median; a single disturbed value hardly changes it."""
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    return MEDIAN_ERROR * deviation / math.sqrt(len(values))


def _range(values: Sequence[float]) -> float:
    """The largest less the least."""
    return max(values) - min(values)
