"""Pass@1 with an interval that knows that answers to one problem go together."""

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def pass_at_1(right: Sequence[Sequence[bool]]) -> float:
    """Share of right answers, problems weighted equally.

    Args:
        right: for each problem, whether each of its sampled answers is right.
    """
    return sum(sum(answers) / len(answers) for answers in right) / len(right)


def interval(right: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % Wilson score interval of pass@1, with the effective number of independent answers.

    Answers to one problem are correlated, so their number is divided by the design effect: the variance between
    problems over the variance that independent answers would have. It lies between the number of problems and the
    number of answers. Wilson's interval stays inside [0, 1] and has width where all answers are right.
    """
    p = pass_at_1(right)
    independent = effective_number(right)
    centre = (p + Z_95**2 / (2 * independent)) / (1 + Z_95**2 / independent)
    half = Z_95 / (1 + Z_95**2 / independent)
    half *= math.sqrt(p * (1 - p) / independent + Z_95**2 / (4 * independent**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def effective_number(right: Sequence[Sequence[bool]]) -> float:
    """How many independent answers tell as much as these do. Source: Kish, Survey Sampling (1965), section 5.4."""
    problems, p = len(right), pass_at_1(right)
    answers = sum(len(sampled) for sampled in right)
    if problems < 2 or not 0 < p < 1:
        return float(problems)
    variance = sum((sum(s) / len(s) - p) ** 2 for s in right) / (problems - 1) / problems
    if variance == 0:
        return float(answers)
    return min(float(answers), max(float(problems), p * (1 - p) / variance))
