"""Channel contribution against zeroing a channel, linear fits against torch's own least squares."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.packing import Batch
from components.search.library.calibration import observe
from components.search.library.initialisation import (
    RIDGE,
    LeastSquares,
    channel_contributions,
    fit_linear,
    share_of_top,
)
from components.search.library.local_distillation import normalised_mse
from components.search.space.layer_space import PARTS, Variant
from components.search.space.subblocks import build_subblock, initialise, load_block, subblock_weights

LINEAR = [Variant(part, "linear") for part in PARTS]


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 999))
def test_sums_over_pieces_give_the_least_squares_of_the_whole(size: int, more: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs_ND = torch.randn(4 * size + more, size, generator=generator, dtype=torch.float64)
    outputs_ND = torch.randn(4 * size + more, size, generator=generator, dtype=torch.float64)
    fit = LeastSquares()
    for pieces in zip(inputs_ND.split(3), outputs_ND.split(3), strict=True):
        fit.add(*pieces)
    # a ridge is as if there were tokens that are one input each, and nothing came out
    ridge = RIDGE * inputs_ND.square().sum() / size
    rows_DD = ridge.sqrt() * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([inputs_ND, rows_DD]), torch.cat([outputs_ND, 0 * rows_DD])).solution.T
    torch.testing.assert_close(fit.matrix(), expected)


def test_a_matrix_is_found_again() -> None:
    inputs_ND, matrix_DD, fit = torch.randn(400, 5), torch.randn(5, 5), LeastSquares()
    fit.add(inputs_ND, inputs_ND @ matrix_DD.T)
    torch.testing.assert_close(fit.matrix().float(), matrix_DD, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_fitted_part_is_better_than_nothing_and_than_the_product(
    parent: TesseraForCausalLM, batches: list[Batch], context: StageContext, tmp_path: Path, layer: int
) -> None:
    keys = [(layer, variant) for variant in (*LINEAR, Variant("ffn", 32))]
    fit_linear(parent, keys, batches, tmp_path, context)
    assert sorted(file.stem for file in tmp_path.rglob("*.safetensors")) == ["attention-linear", "ffn-linear"]
    for variant in LINEAR:
        own = subblock_weights(parent.model.layers[layer].state_dict(), variant.part)
        product = initialise(own, variant, importance_I=None, head_dim=32)
        fitted, guessed = (
            sum(error_of(parent, layer, variant, weights, batch) for batch in batches) / len(batches)
            for weights in (load_block([tmp_path], (layer, variant)), product)
        )
        assert fitted < 1
        assert fitted < guessed


@torch.no_grad()
def error_of(
    parent: TesseraForCausalLM, layer: int, variant: Variant, weights: dict[str, torch.Tensor], batch: Batch
) -> float:
    seen, _ = observe(parent, batch, [layer])
    lesson, mask_BT = seen[layer, variant.part], batch.segment_ids_BT > 0
    block = build_subblock(parent, layer, variant, weights, training=False)
    return float(normalised_mse(lesson.output_BTD[mask_BT], block(lesson.hidden_BTD, lesson.context)[mask_BT]))


def test_contribution_is_how_far_zeroing_a_channel_moves_the_output(
    parent: TesseraForCausalLM, batches: list[Batch], context: StageContext
) -> None:
    contributions = channel_contributions(parent, batches[:1], context)
    mask_BT = batches[0].segment_ids_BT > 0
    layer, mlp = 2, parent.model.layers[2].mlp
    seen, _ = observe(parent, batches[0], [layer])
    before_ND = seen[layer, "ffn"].output_BTD[mask_BT]
    for channel in (0, 17, 63):
        kept = mlp.down_proj.weight[:, channel].clone()
        mlp.down_proj.weight[:, channel] = 0
        normed = parent.model.layers[layer].post_attention_layernorm(seen[layer, "ffn"].hidden_BTD)
        moved_N = (mlp(normed)[mask_BT] - before_ND).norm(dim=-1)
        mlp.down_proj.weight[:, channel] = kept
        assert float(contributions[layer][channel]) == pytest.approx(float(moved_N.mean()), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_last_batch_may_have_fewer_rows(
    rows: int, parent: TesseraForCausalLM, batches: list[Batch], context: StageContext
) -> None:
    whole = batches[0].rows(0, 2 + rows)
    expected = channel_contributions(parent, [whole], context)
    found = channel_contributions(parent, [whole.rows(0, 2), whole.rows(2, 2 + rows)], context)
    assert all(torch.allclose(found[layer], expected[layer], rtol=1e-4) for layer in expected)


def test_padding_does_not_count(parent: TesseraForCausalLM, batches: list[Batch], context: StageContext) -> None:
    batch = batches[0]
    assert bool((batch.segment_ids_BT == 0).any()), "the fixture has padding"
    scrambled = batch.input_ids_BT.clone()
    scrambled[batch.segment_ids_BT == 0] = 5
    other = Batch(scrambled, batch.labels_BT, batch.position_ids_BT, batch.segment_ids_BT)
    expected, found = (channel_contributions(parent, [b], context) for b in (batch, other))
    for layer, values_I in expected.items():
        torch.testing.assert_close(found[layer], values_I)


def test_share_of_top_by_hand() -> None:
    assert share_of_top(torch.tensor([1.0, 4.0, 3.0, 2.0]), 0.5) == pytest.approx(0.7)
