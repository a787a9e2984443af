"""Mixed precision, norm and rotary positions against plain PyTorch and Hugging Face."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from components.core.model import layers
from components.core.model.checkpoint import load_model, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.layers import rms_norm, rotate
from tests.components.core import tiny_models

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_norm_and_its_gradients_are_those_of_pytorch(dtype: torch.dtype) -> None:
    values, scale, outer = torch.randn(2, 5, 12), torch.randn(12), torch.randn(2, 5, 12)
    found = []
    for norm in (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (12,), w, 1e-5)):
        x, weight = (tensor.to(dtype).requires_grad_(True) for tensor in (values, scale))
        y = norm(x, weight)  # type: ignore[no-untyped-call]
        y.backward(outer.to(dtype))
        assert y.dtype == dtype
        found.append((y, x.grad, weight.grad))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_scale_at_another_precision_leaves_the_type_of_the_stream() -> None:
    x = torch.randn(3, 8)
    assert rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-5).dtype == torch.float32
    assert rms_norm(x.bfloat16(), torch.ones(8), 1e-5).dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotary_positions_and_their_gradients_are_those_of_hugging_face(dtype: torch.dtype, batch: int) -> None:
    angles = torch.randn(batch, 5, 4, dtype=dtype).repeat(1, 1, 2)
    rotary = angles.cos(), angles.sin()
    queries, keys = torch.randn(2, 6, 5, 8, dtype=dtype), torch.randn(2, 3, 5, 8, dtype=dtype)
    outer = torch.randn(2, 6, 5, 8, dtype=dtype), torch.randn(2, 3, 5, 8, dtype=dtype)
    found = []
    for turn in (lambda q, k: (rotate(q, rotary), rotate(k, rotary)), lambda q, k: apply_rotary_pos_emb(q, k, *rotary)):
        q, k = (tensor.clone().requires_grad_(True) for tensor in (queries, keys))
        turned = turn(q, k)
        torch.autograd.backward(turned, outer)
        found.append((*turned, q.grad, k.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


IDS = torch.arange(2, 42).reshape(2, 20)
SHAPES: tiny_models.Shapes = [(4, 40), (None, 100), ("linear", "linear"), (1, 17)]


def stored(folder: Path, dtype: torch.dtype, **changes: bool) -> Path:
    model = tiny_models.heterogeneous(0, SHAPES, **changes)
    model.to(dtype)
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
    monkeypatch.setattr(layers, "CAST_VALUES", 3 * 64)  # three rows of a matrix at once
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
