"""Whether a new version of a served model is worse than the old one, by the answers of both to the same questions.

A version is refused where a number is worse by more than its tolerance, and surely worse: the 99 % interval of the
paired difference leaves out zero. The tolerance lets differences pass that are sure and do not matter, the interval
those of chance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from components.eval.gains import paired_interval

CONFIDENCE = 0.99
THINKING_TOLERANCE = 0.5
"""Change of the mean length of thinking that is accepted, as a fraction of the longer one: to half, or to twice."""


@dataclass(frozen=True)
class Reply:
    """The answer of one version to one question in one mode.

    Attributes:
        failed: the server gave an error, or no answer in time.
        correct: None where it cannot be decided.
        format_ok: whether it has the format of its mode.
        cut_off: whether it ends at the limit of tokens.
        thinking: characters of thinking; None where the mode is off, or the server failed.
    """

    failed: bool = False
    correct: bool | None = None
    format_ok: bool = False
    cut_off: bool = False
    thinking: int | None = None


Pair = tuple[Sequence[Reply], Sequence[Reply]]
"""Replies of the stable version and of the canary to one question, in the same modes."""


@dataclass(frozen=True)
class Criterion:
    """A number that is compared.

    Attributes:
        name: for the table.
        number: of a reply; None where it has none.
        bad: which direction is worse.
    """

    name: str
    number: Callable[[Reply], float | None]
    bad: Literal["lower", "higher", "change"]


CRITERIA = (
    Criterion("failed", lambda reply: float(reply.failed), "higher"),
    Criterion("correct", lambda reply: None if reply.correct is None else float(reply.correct), "lower"),
    Criterion("in format", lambda reply: float(reply.format_ok), "lower"),
    Criterion("cut off", lambda reply: float(reply.cut_off), "higher"),
    Criterion("thinking, characters", lambda reply: reply.thinking, "change"),
)


@dataclass(frozen=True)
class Finding:
    """One number of both versions.

    Attributes:
        name: of the criterion.
        stable: mean of the stable version.
        canary: mean of the canary.
        difference: canary minus stable; for a change, as a fraction of the larger mean.
        interval: 99 % confidence interval of the difference.
        tolerance: difference that is accepted.
        questions: that have the number on both sides.
        is_worse: whether the canary is refused for it.
    """

    name: str
    stable: float
    canary: float
    difference: float
    interval: tuple[float, float]
    tolerance: float
    questions: int
    is_worse: bool


def compare(pairs: Sequence[Pair], tolerance: float) -> list[Finding]:
    """Compare every number that some question has on both sides.

    Args:
        pairs: replies to each question.
        tolerance: fraction of answers by which the canary may be worse.
    """
    return [found for criterion in CRITERIA if (found := _finding(criterion, pairs, tolerance)) is not None]


def _finding(criterion: Criterion, pairs: Sequence[Pair], tolerance: float) -> Finding | None:
    """The comparison by one criterion; None where no question has its number on both sides."""
    values = [
        (stable, canary)
        for sides in pairs
        if (stable := _mean(criterion, sides[0])) is not None and (canary := _mean(criterion, sides[1])) is not None
    ]
    if not values:
        return None
    stable_mean, canary_mean = (sum(side) / len(values) for side in zip(*values, strict=True))
    is_change = criterion.bad == "change"
    unit = (max(stable_mean, canary_mean) or 1.0) if is_change else 1.0
    low, high = paired_interval([(canary - stable) / unit for stable, canary in values], CONFIDENCE)
    difference = (canary_mean - stable_mean) / unit
    accepted = THINKING_TOLERANCE if is_change else tolerance
    falls, rises = difference < -accepted and high < 0, difference > accepted and low > 0
    is_worse = {"lower": falls, "higher": rises, "change": falls or rises}[criterion.bad]
    return Finding(
        name=criterion.name,
        stable=stable_mean,
        canary=canary_mean,
        difference=difference,
        interval=(low, high),
        tolerance=accepted,
        questions=len(values),
        is_worse=is_worse,
    )


def _mean(criterion: Criterion, replies: Sequence[Reply]) -> float | None:
    """Mean over the modes of a question that have the number."""
    numbers = [number for reply in replies if (number := criterion.number(reply)) is not None]
    return sum(numbers) / len(numbers) if numbers else None
