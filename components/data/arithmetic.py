"""A small world of multi-step problems: chains of one-digit operations modulo 10, worked from left to right.

    question   7+5*3-2=          (7 + 5 = 12 → 2; 2 * 3 = 6; 6 - 2 = 4)
    trace      +52*36-24         each step: operation, operand, and the value that it leads to
    answer     4

Whoever works step by step needs one small fact a step; whoever answers at once has to do all steps unseen.
"""

import hashlib
import operator
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

OPERATIONS: Mapping[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
MODULUS = 10
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Problem:
    """One chain."""

    question: str
    trace: str
    answer: str
    level: int
    """Operations in the chain."""


def make_problem(level: int, rng: random.Random) -> Problem:
    """A random chain of `level` operations."""
    value = rng.randrange(MODULUS)
    question, trace = str(value), ""
    for _ in range(level):
        sign, operand = rng.choice("+-*"), rng.randrange(MODULUS)
        value = OPERATIONS[sign](value, operand) % MODULUS
        question += f"{sign}{operand}"
        trace += f"{sign}{operand}{value}"
    return Problem(question + "=", trace, str(value), level)


def solve(question: str) -> str:
    """The exact answer to a question of this world."""
    chain = question.rstrip("=")
    value = int(chain[0])
    for sign, operand in zip(chain[1::2], chain[2::2], strict=True):
        value = OPERATIONS[sign](value, int(operand)) % MODULUS
    return str(value)


def split_of(question: str) -> str:
    """The split that a question belongs to, by its hash: no question is in two. One in five is not for training."""
    bucket = hashlib.sha256(question.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def sample(
    split: str,
    count: int,
    levels: tuple[int, int],
    rng: random.Random,
    hard: tuple[tuple[int, int], float] | None = None,
) -> list[Problem]:
    """Distinct problems of one split.

    Args:
        split: train, validation or test.
        count: how many; fewer where the levels have no more (level 1 has 300 in all splits together).
        levels: fewest and most operations, all equally likely.
        rng: source of randomness.
        hard: other levels, and the share of problems that come from them.
    """
    found: dict[str, Problem] = {}
    misses = 0
    while len(found) < count and misses < 100 * count:
        low, high = hard[0] if hard is not None and rng.random() < hard[1] else levels
        problem = make_problem(rng.randint(low, high), rng)
        if problem.question in found or split_of(problem.question) != split:
            misses += 1
            continue
        found[problem.question] = problem
    return list(found.values())
