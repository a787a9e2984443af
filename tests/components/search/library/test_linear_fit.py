"""Linear sub-blocks by least squares, against torch's own solver and against what they replace."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.packing import Batch
from components.search.library.activations import observe
from components.search.library.linear_fit import RIDGE, LeastSquares, fit_linear
from components.search.library.local_distillation import normalised_mse
from components.search.space.build import build_subblock
from components.search.space.layer_space import PARTS, Variant
from components.search.space.library_files import load_block
from components.search.space.variant_weights import initialise, subblock_weights

LINEAR = [Variant(part, "linear") for part in PARTS]


@settings(max_examples=25, deadline=None)
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
