"""Root-mean-square norm and rotary positions, each with a backward pass of its own.

PyTorch composes both from elementwise operations on a CPU; a backward pass written out takes half the time. Forward
values are those of Hugging Face's Llama to the bit.

Shape letters: B sequences, T tokens, D hidden size, H heads, E head size.
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x` over the root of its mean square, times the scale; any float type, computed in float32 at least."""
    normed: Tensor = _RMSNorm.apply(x_BTD, weight_D, eps)  # type: ignore[no-untyped-call]
    return normed


def rotate(x_BHTE: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys turned by their positions; `rotary` is cosine and sine, (B, T, E) or (1, T, E).

    Source: arXiv 2104.09864, with the two halves of a head as pairs, as Llama has them.
    """
    cos_B1TE, sin_B1TE = (values.unsqueeze(1) for values in rotary)
    turned: Tensor = _Rotate.apply(x_BHTE, cos_B1TE, sin_B1TE)  # type: ignore[no-untyped-call]
    return turned


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = x.to(dtype).square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        products = outer[0] * normed
        weight_grad = products.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = products.mul_(weight).mean(dim=-1, keepdim=True)
        x_grad = (outer[0] * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return x_grad, weight_grad, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(outer[0], cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (first half, second half) turned by its angle."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned
