"""Pass@1 and its confidence interval, for answers to the same problem that are correlated."""

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def pass_at_1(correct: Sequence[Sequence[bool]]) -> float:
    """Fraction of correct answers, problems weighted equally.

    Args:
        correct: for each problem, whether each of its sampled answers is correct.
    """
    return sum(sum(answers) / len(answers) for answers in correct) / len(correct)


def interval(correct: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % Wilson score interval of pass@1, with the effective number of independent answers.

    Answers to one problem are correlated, so their number is divided by the design effect: the variance between
    problems over the variance that independent answers would have. It lies between the number of problems and the
    number of answers. Wilson's interval stays inside [0, 1], and its width is not zero if all answers are correct.
    """
    p = pass_at_1(correct)
    independent = effective_number(correct)
    centre = (p + Z_95**2 / (2 * independent)) / (1 + Z_95**2 / independent)
    half = Z_95 / (1 + Z_95**2 / independent)
    half *= math.sqrt(p * (1 - p) / independent + Z_95**2 / (4 * independent**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def effective_number(correct: Sequence[Sequence[bool]]) -> float:
    """Number of independent answers with the same variance. Source: Kish, Survey Sampling (1965), section 5.4."""
    problems, p = len(correct), pass_at_1(correct)
    answers = sum(len(sampled) for sampled in correct)
    if problems < 2 or not 0 < p < 1:
        return float(problems)
    variance = sum((sum(s) / len(s) - p) ** 2 for s in correct) / (problems - 1) / problems
    if variance == 0:
        return float(answers)
    return min(float(answers), max(float(problems), p * (1 - p) / variance))
