"""Norm and rotary positions, and their gradients, against plain PyTorch and Hugging Face."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from components.core.model.norm_and_rotary import rms_norm, rotate

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
