"""Standard errors against resampling, margins against all choices."""

import itertools

import numpy as np
import pytest

from components.search.costs.resources import Costs
from components.search.scoring.score_table import BlockScore, ShardScores, standard_error
from components.search.solver.explain import margins
from components.search.solver.option_table import Option, OptionTable, Slot
from components.search.solver.solve import solve_problem


def test_standard_error_is_the_spread_of_means_of_other_text() -> None:
    generator = np.random.default_rng(0)

    def text(rows: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        tokens_R = generator.integers(20, 60, rows).astype(float)
        return tokens_R * generator.gamma(2.0, 0.1, rows), tokens_R

    means = [sums_R.sum() / tokens_R.sum() for sums_R, tokens_R in (text(40) for _ in range(4000))]
    errors = [standard_error(*text(40)) for _ in range(400)]
    assert np.mean([error for error in errors if error is not None]) == pytest.approx(np.std(means), rel=0.05)


def test_a_single_row_has_no_standard_error() -> None:
    assert standard_error(np.array([1.0]), np.array([10.0])) is None


SIZES = (4, 2, 0)
TOKENS = (30, 31, 29, 30, 30, 30)
LIMITS = {"parameters": 9.0}


def made_up(seed: int) -> tuple[OptionTable, ShardScores]:
    """Four slots of three sizes with scores of six rows."""
    generator = np.random.default_rng(seed)
    slots, blocks = [], []
    for layer, part in itertools.product(range(2), ("attention", "ffn")):
        options = [Option(name=f"{part}-4", size=4, score=0.0, costs=Costs(parameters=4))]
        for size in SIZES[1:]:
            rows = tuple(30 * generator.gamma(2.0, 0.05 * (5 - size), len(TOKENS)))
            kl = sum(rows) / sum(TOKENS)
            blocks.append(BlockScore(layer=layer, part=part, size=size, kl=kl, row_sums={"kl": rows}))
            options.append(Option(name=f"{part}-{size}", size=size, score=kl, costs=Costs(parameters=size)))
        slots.append(Slot(layer=layer, part=part, options=tuple(options)))
    table = OptionTable(fixed=Costs(), slots=tuple(slots))
    return table, ShardScores(tokens=sum(TOKENS), row_tokens=TOKENS, blocks=tuple(blocks))


@pytest.mark.parametrize("seed", range(5))
def test_margins_are_those_of_the_best_of_all_other_choices(seed: int) -> None:
    table, shard = made_up(seed)
    solution = solve_problem(table.problem(table.scores, LIMITS))
    assert solution is not None
    every = [c for c in itertools.product(range(3), repeat=4) if table.costs(c).parameters <= 9]
    rows = {(b.layer, b.part, b.size): np.array(b.row_sums["kl"]) for b in shard.blocks}

    def row_sums(choice: tuple[int, ...]) -> np.ndarray:  # type: ignore[type-arg]
        keys = [(s.layer, s.part, s.options[c].size) for s, c in zip(table.slots, choice, strict=True)]
        return sum((rows.get(key, np.zeros(len(TOKENS))) for key in keys), start=np.zeros(len(TOKENS)))

    for number, margin in enumerate(margins(table, LIMITS, solution.choice, [shard], "kl")):
        other = min((c for c in every if c[number] != solution.choice[number]), key=table.score)
        difference = table.score(other) - solution.objective
        assert margin.difference == pytest.approx(difference)
        assert margin.following == table.slots[number].options[other[number]].name
        expected = standard_error(row_sums(other) - row_sums(solution.choice), np.array(TOKENS, dtype=float))
        assert margin.error == pytest.approx(expected)
        assert margin.within_noise == (difference < 2 * (expected or 0))


def test_no_margin_where_nothing_else_is_within_the_limits() -> None:
    table, shard = made_up(0)
    found = margins(table, {"parameters": 0.0}, (2, 2, 2, 2), [shard], "kl")
    assert all(margin.following is None and margin.within_noise is None for margin in found)
