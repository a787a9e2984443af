"""The training problems: which are drawn, their prompts, and their order from easy to hard.

Source: arXiv 2505.00949, section 5.1.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from components.core.base.errors import DataError
from components.core.text.chat import prompt_ids
from components.core.text.judges.reasoning_tasks import Verifier
from components.core.text.packing import read_rows
from components.core.text.problems import with_distinct_ids
from components.rl.config import RlConfig
from components.rl.rollout import Problem

NUM_BINS = 10
WIDTH = 0.2
"""Standard deviation of the Gaussian over pass rates; the paper does not say which it has."""


def load_problems(problems: Path, config: RlConfig) -> list[dict[str, object]]:
    """Training problems of `min_level` and above in seeded order, at most `max_problems`.

    Raises:
        DataError: there are none.
    """
    all_rows = list(read_rows(problems / "train.jsonl"))
    if not all_rows:
        raise DataError("there are no training problems", hint="give the recipe `rl:` problems with answers")
    levels = [int(str(row.get("level", 0))) for row in all_rows]
    distinct_rows = with_distinct_ids(all_rows)
    rows = [row for row, level in zip(distinct_rows, levels, strict=True) if level >= config.min_level]
    if not rows:
        raise DataError(
            f"no training problem has level {config.min_level} or above; the highest is {max(levels)}",
            hint="lower rl.min_level",
        )
    random.Random(config.seed or 0).shuffle(rows)
    return rows[: config.max_problems]


def to_problems(rows: Sequence[dict[str, object]], tokenizer: Path, mode: str) -> list[Problem]:
    """Problems with their prompts in one mode."""
    encoded = prompt_ids(tokenizer, [str(row["question"]) for row in rows], mode)
    return [
        Problem(str(row["id"]), ids, str(row["answer"]), mode, Verifier.of_row(row))
        for row, ids in zip(rows, encoded, strict=True)
    ]


def longest_prompt(rows: Sequence[dict[str, object]], tokenizer: Path, config: RlConfig) -> int:
    """Tokens of the longest prompt, over the modes that rollouts ask for."""
    modes = ("on", "off") if config.thinking_off_fraction else ("on",)
    return max(len(problem.prompt_ids) for mode in modes for problem in to_problems(rows, tokenizer, mode))


def mixed_modes(
    rows: Sequence[dict[str, object]], batch: Sequence[int], tokenizer: Path, config: RlConfig, step: int
) -> list[Problem]:
    """The problems of a batch, `thinking_off_fraction` of them with thinking off."""
    chosen = [rows[number] for number in batch]
    num_off = round(config.thinking_off_fraction * len(chosen))
    random.Random((config.seed or 0) + step).shuffle(chosen)
    off = to_problems(chosen[:num_off], tokenizer, "off") if num_off else []
    return to_problems(chosen[num_off:], tokenizer, "on") + off


def order_problems(
    pass_rates: Sequence[float], *, batch_size: int, num_batches: int, seed: int, width: float = WIDTH
) -> list[list[int]]:
    """Problem numbers of each batch.

    The target of a batch is a Gaussian over pass rates, whose centre moves from the highest rate to the lowest. What a
    bin lacks is taken from the fullest bins. When all problems are used, the bins are filled again.

    Args:
        pass_rates: pass rate of each problem, 0 to 1.
        batch_size: problems in a batch.
        num_batches: number of batches.
        seed: order within bins and batches.
        width: standard deviation of the Gaussian, in pass rate.

    Returns:
        `num_batches` lists of `batch_size` numbers.
    """
    generator = np.random.default_rng(seed)
    rates = np.asarray(pass_rates, dtype=np.float64)
    bins = np.minimum((rates * NUM_BINS).astype(int), NUM_BINS - 1)
    pools = _pools(bins, generator)
    batches = []
    for centre in np.linspace(rates.max(), rates.min(), num_batches):
        target = gaussian_counts(centre, width, batch_size)
        batch: list[int] = []
        for number in range(NUM_BINS):
            batch += [pools[number].pop() for _ in range(min(target[number], len(pools[number])))]
        while len(batch) < batch_size:
            fullest = max(range(NUM_BINS), key=lambda k: len(pools[k]))
            if not pools[fullest]:
                pools = _pools(bins, generator)
                continue
            batch.append(pools[fullest].pop())
        batches.append([int(i) for i in generator.permutation(batch)])
    return batches


def _pools(bins: NDArray[np.int_], generator: np.random.Generator) -> list[list[int]]:
    """Problem numbers of each bin, shuffled."""
    return [[int(i) for i in generator.permutation(np.flatnonzero(bins == number))] for number in range(NUM_BINS)]


def gaussian_counts(centre: float, width: float, batch_size: int) -> list[int]:
    """Target number of problems from each bin: the Gaussian, rounded by largest remainders to a sum of `batch_size`."""
    middles = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    weights = np.exp(-0.5 * ((middles - centre) / width) ** 2)
    exact = batch_size * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")[: batch_size - counts.sum()]
    counts[largest] += 1
    return [int(count) for count in counts]
