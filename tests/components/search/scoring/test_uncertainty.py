"""Standard errors against resampling, margins against all choices, dropping against the solver's answer."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import quiet_context
from components.core.text.packing import Batch
from components.search.costs.resources import Costs
from components.search.scoring import replace_one_block as scoring
from components.search.scoring.dominance import score_undominated
from components.search.scoring.records import BlockScore, ShardScores
from components.search.scoring.replace_one_block import score_replacements
from components.search.scoring.score_table import shard_scores
from components.search.scoring.uncertainty import standard_error
from components.search.solver.margins import margins
from components.search.solver.option_table import Option, OptionTable, Slot
from components.search.solver.solve import solve_problem
from components.search.space.build import build_subblock
from components.search.space.layer_space import Variant
from components.search.space.library_files import BlockKey
from components.search.space.subblock import Subblock
from components.search.space.variant_weights import initialise, subblock_weights


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


@pytest.mark.parametrize("seed", range(3))
def test_the_best_choice_is_the_same_with_dominated_variants_dropped(
    parent: TesseraForCausalLM,
    batches: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.setattr(scoring, "TOKENS_IN_FLIGHT", 1)
    generator = np.random.default_rng(seed)
    variants: dict[BlockKey, Subblock | None] = {}
    for layer in range(2):
        own = subblock_weights(parent.model.layers[layer].state_dict(), "ffn")
        variants[layer, Variant("ffn", 0)] = None
        for width in (8, 32, 48):
            weights = initialise(own, Variant("ffn", width), importance_I=torch.rand(64), head_dim=32)
            spoilt = {
                name: tensor * (3.0 if width == 48 else float(generator.choice([1.0, 3.0])))
                for name, tensor in weights.items()
            }
            variants[layer, Variant("ffn", width)] = build_subblock(parent, layer, Variant("ffn", width), spoilt)
    costs = {key: (float(key[1].count), float(generator.integers(1, 4)) if key[1].size else 1.0) for key in variants}
    own_costs: dict[BlockKey, tuple[float, float]] = {(layer, Variant("ffn", 64)): (64, 3.0) for layer in range(2)}

    whole = shard_scores(score_replacements(parent, variants, batches, quiet_context(tmp_path / "a")))
    found = score_undominated(
        parent,
        variants,
        batches,
        quiet_context(tmp_path / "b"),
        costs=costs | own_costs,
    )
    cut = shard_scores(found)
    assert any(block.dropped for block in cut.blocks)

    def best(scores: ShardScores, limit: float) -> Fraction:
        """By all choices; the score of the chosen ones as the whole text has it."""
        kl = {(b.layer, b.size): b.kl for b in scores.blocks} | {(layer, 64): 0.0 for layer in range(2)}
        true = {(b.layer, b.size): b.kl for b in whole.blocks} | {(layer, 64): 0.0 for layer in range(2)}
        sizes = (64, 48, 32, 8, 0)
        weight = {
            (layer, size): (64, 3.0) if size == 64 else costs[layer, Variant("ffn", size)]
            for layer in range(2)
            for size in sizes
        }
        within = [
            c
            for c in itertools.product(sizes, repeat=2)
            if sum(weight[n, s][0] for n, s in enumerate(c)) <= limit
            and sum(weight[n, s][1] for n, s in enumerate(c)) <= 5
        ]
        chosen = min(within, key=lambda c: sum(kl[n, s] for n, s in enumerate(c)))
        return Fraction(sum(true[n, s] for n, s in enumerate(chosen)))

    for limit in (0, 8, 16, 40, 64, 96, 128):
        assert best(cut, limit) == best(whole, limit)
