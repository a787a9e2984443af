"""Weights kept at one precision and computed at another, against a model that has them at that precision."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from components.core.model import mixed_precision as precision
from components.core.model.checkpoint import load_model, save_model
from components.core.model.decoder import TesseraForCausalLM
from tests.components.core import tiny_models

IDS = torch.arange(2, 42).reshape(2, 20)
SHAPES: tiny_models.Shapes = [(4, 40), (None, 100), ("linear", "linear"), (1, 17)]


def stored(folder: Path, dtype: torch.dtype, **changes: bool) -> Path:
    model = tiny_models.heterogeneous(0, SHAPES, **changes)
    nn.Module.to(model, dtype)
    save_model(model, folder, tokenizer=None)
    return folder


@torch.no_grad()
def logits(model: TesseraForCausalLM) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"qkv_bias": True, "mlp_bias": True}], ids=str)
def test_half_as_large_weights_compute_what_the_same_weights_in_float32_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, bool]
) -> None:
    folder = stored(tmp_path / "model", torch.bfloat16, **changes)
    small, large = load_model(folder, dtype=None, computes_in=torch.float32), load_model(folder)
    torch.testing.assert_close(logits(small), logits(large), atol=1e-5, rtol=0)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    monkeypatch.setattr(precision, "CAST_VALUES", 3 * 64)  # three rows of a matrix at once
    torch.testing.assert_close(logits(small), logits(large), atol=1e-5, rtol=0)


def test_arithmetic_in_bfloat16_is_that_of_a_model_in_bfloat16(tmp_path: Path) -> None:
    folder = stored(tmp_path / "model", torch.float32)
    mixed, plain = load_model(folder, computes_in=torch.bfloat16), load_model(folder, dtype=torch.bfloat16)
    assert logits(mixed).dtype == torch.bfloat16
    assert torch.equal(logits(mixed), logits(plain))


def test_autocast_decides_by_itself(tmp_path: Path) -> None:
    model = load_model(stored(tmp_path / "model", torch.bfloat16), dtype=None, computes_in=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = logits(model)
        assert torch.equal(cast, logits(load_model(tmp_path / "model")))
    assert cast.dtype == torch.bfloat16


def test_weights_of_another_precision_have_gradients_of_their_own(tmp_path: Path) -> None:
    folder = stored(tmp_path / "model", torch.bfloat16)
    small, large = load_model(folder, dtype=None, computes_in=torch.float32), load_model(folder)
    for model in (small, large):
        model(IDS, labels=IDS).loss.backward()
    for ours, theirs in zip(small.parameters(), large.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad.bfloat16(), atol=1e-6, rtol=2**-7)


def test_a_copy_computes_at_the_same_precision(tmp_path: Path) -> None:
    model = load_model(stored(tmp_path / "model", torch.bfloat16), dtype=None, computes_in=torch.float32)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
