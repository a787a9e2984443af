"""Held-out KL with its noise, and the choice between candidates that it decides."""

import itertools
import math
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.corpus.encoding import load_corpus
from components.core.text.packing import IGNORE, Batch, PackedStream
from components.search.child.child_model import assemble
from components.search.child.evaluation import HeldOut, held_out_kl
from components.search.child.ffn_fusion import ChildLayer
from components.search.config import Candidates
from components.search.refine.candidate_trials import compare_candidates, judge
from components.search.space.subblocks import subblock_weights


def without_layer(parent: TesseraForCausalLM, number: int) -> TesseraForCausalLM:
    layers = []
    for place, block in enumerate(parent.model.layers):
        state = block.state_dict()
        weights = subblock_weights(state, "attention") | subblock_weights(state, "ffn")
        layers.append(ChildLayer(4, 64, partial(dict, weights), (place,)))
    return assemble(parent, [layer for layer in layers if layer.parent_layers != (number,)])


def test_held_out_kl_is_the_formula_token_by_token(parent: TesseraForCausalLM, batches: list[Batch]) -> None:
    child = without_layer(parent, 2)
    itself, found = held_out_kl(parent, [parent, child], batches)
    assert itself.kl == pytest.approx(0, abs=1e-6)
    total = tokens = 0.0
    for batch in batches:
        inputs = {"position_ids": batch.position_ids_BT, "segment_ids": batch.segment_ids_BT}
        with torch.no_grad():
            p, q = (model(batch.input_ids_BT, **inputs).logits.log_softmax(-1) for model in (parent, child))
        for b, t in (batch.labels_BT != IGNORE).nonzero().tolist():
            total += float((p[b, t].exp() * (p[b, t] - q[b, t])).sum())
            tokens += 1
    assert found.kl == pytest.approx(total / tokens, rel=1e-4)
    assert sum(found.tokens) == tokens


def test_the_error_of_a_difference_is_what_other_rows_would_scatter_by() -> None:
    generator = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        tokens = generator.integers(20, 40, 30)
        noise = generator.normal(0, 1.0, 30)  # shared: rows are hard or easy for both
        first = HeldOut(tuple(tokens * (2 + noise)), tuple(tokens))
        second = HeldOut(tuple(tokens * (2.3 + noise + generator.normal(0, 0.2, 30))), tuple(tokens))
        mean, error = second.minus(first)
        means.append(mean)
        errors.append(error)
    assert np.mean(means) == pytest.approx(0.3, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_one_row_says_nothing_about_its_noise() -> None:
    assert HeldOut((1.0,), (2,)).minus(HeldOut((3.0,), (2,))) == (-1.0, math.inf)


def rows(mean: float, seed: int, noise: float = 0.0) -> HeldOut:
    dice = random.Random(seed)
    return HeldOut(tuple(10 * (mean + dice.gauss(0, noise)) for _ in range(16)), (10,) * 16)


def test_a_candidate_wins_only_beyond_the_noise() -> None:
    choices = [((number,), float(number)) for number in range(3)]
    before = [rows(1.0, 0)] * 3
    clear = judge(choices, before, [rows(0.50, 0, 0.01), rows(0.45, 1, 0.01), rows(0.40, 2, 0.01)])
    assert [trial.chosen for trial in clear] == [False, False, True]
    assert clear[2].difference == pytest.approx(-0.1, abs=0.02)
    noisy = judge(choices, before, [rows(0.50, 0, 0.3), rows(0.49, 1, 0.3), rows(0.49, 2, 0.3)])
    assert [trial.chosen for trial in noisy] == [True, False, False]


def test_candidates_are_distilled_alike_and_again_to_the_same_numbers(
    parent: TesseraForCausalLM, parent_folder: Path, corpus: Path, batches: list[Batch], context: StageContext
) -> None:
    stream = PackedStream(load_corpus(corpus, parent_folder, "train"), 32, 0)

    def run(order: list[int], own: StageContext) -> dict[int, tuple[float, float]]:
        found = compare_candidates(
            parent,
            [((number,), 0.0) for number in order],
            lambda choice: without_layer(parent, choice[0]),
            stream,
            batches,
            Candidates(count=2, num_steps=12, learning_rate=2e-3),
            batch_size=4,
            context=own,
        )
        assert sum(trial.chosen for trial in found) == 1
        return {trial.choice[0]: (trial.kl_before, trial.kl_after) for trial in found}

    found = run([1, 2], context)
    assert sum(after for _, after in found.values()) < sum(before for before, _ in found.values())
    other = replace(context, resume=replace(context.resume, folder=context.resume.folder / "again"))
    assert run([2, 1], other) == found


def test_rows_of_two_models_are_compared_pair_by_pair() -> None:
    for shift, noise in itertools.product((0.0, 0.5), (0.0, 0.2)):
        first = rows(1.0, 3, noise)
        second = HeldOut(tuple(value + 10 * shift for value in first.sums), first.tokens)
        assert second.minus(first) == pytest.approx((shift, 0.0), abs=1e-9)
