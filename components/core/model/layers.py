"""Layers that compute otherwise than PyTorch's: linear and embedding, RMS norm, rotary positions.

Linear and embedding take weights of one precision and compute in another: weights are cast in pieces, as they are used.
A bfloat16 model then needs two bytes per weight, also where it is computed in float32. The precision of the computation
is that of the residual stream, which begins with the embedding. Under autocast, torch itself decides.

Norm and rotary positions have a backward pass written out: it takes half the time of PyTorch's, which is composed of
elementwise operations on a CPU. Forward values equal those of Hugging Face's Llama to the bit.

Shape letters: B sequences, T tokens, D hidden size, H heads, E head size, F frequencies.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

CAST_VALUES = 1 << 24
"""Maximum number of values of a matrix that are cast at once: 64 MiB in float32."""


class Linear(nn.Linear):
    """Linear layer that computes at the precision of its input."""

    def forward(self, input: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The product; `input` is any float tensor whose last dimension fits.

        With a function, what it makes of the input instead, as the forward pass of this layer: the weights of a sharded
        layer are whole while the function reads them.
        """
        if function is not None:
            return function(input)
        if self.weight.dtype == input.dtype or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        pieces = self.weight.split(max(1, CAST_VALUES // self.in_features))
        products = [F.linear(input, piece.to(input.dtype)) for piece in pieces]
        output = torch.cat(products, dim=-1) if len(products) > 1 else products[0]
        return output if self.bias is None else output + self.bias.to(input.dtype)


class Embedding(nn.Embedding):
    """Embedding whose output may have another precision than its weights.

    Attributes:
        computes_in: precision of the output; None: that of the weights.
    """

    computes_in: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The rows of these token ids."""
        rows = super().forward(input)
        return rows if self.computes_in is None else rows.to(self.computes_in)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x` divided by its root mean square, times the scale; computed in float32 or a wider type."""
    normed: Tensor = _RMSNorm.apply(x_BTD, weight_D, eps)  # type: ignore[no-untyped-call]
    return normed


class RotaryEmbedding(nn.Module):
    """Cosine and sine of the rotary positions, for every type of scaling that Hugging Face knows.

    That of its Llama computes the same, in a module whose import takes seconds.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        # `dynamic_rope_update` reads and sets these attributes.
        self.config, self.rope_type = config, config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        frequencies_F, self.attention_scaling = _inverse_frequencies(config, self.rope_type)
        self.register_buffer("inv_freq", frequencies_F, persistent=False)
        self.register_buffer("original_inv_freq", frequencies_F.clone(), persistent=False)

    @torch.no_grad()
    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, T, E) of positions (B, T), in the precision of `x` and on its device."""
        frequencies_F = self.get_buffer("inv_freq").to(x.device, torch.float32)
        angles_BTE = (position_ids[..., None] * frequencies_F).repeat(1, 1, 2)
        cos_BTE, sin_BTE = (values * self.attention_scaling for values in (angles_BTE.cos(), angles_BTE.sin()))
        return cos_BTE.to(x.dtype), sin_BTE.to(x.dtype)


def _inverse_frequencies(config: PretrainedConfig, rope_type: str) -> tuple[Tensor, float]:
    """Inverse frequencies (E / 2), and what multiplies cosine and sine.

    Source: arXiv 2104.09864, section 3.2.2; Hugging Face has those of the scaled types.
    """
    if rope_type != "default":
        frequencies_F, scaling = ROPE_INIT_FUNCTIONS[rope_type](config)
        return frequencies_F, scaling
    exponents_F = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents_F, 1.0


def rotate(x_BHTE: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys by their positions.

    Args:
        x_BHTE: queries or keys.
        rotary: cosine and sine, (B, T, E) or (1, T, E).

    Source: arXiv 2104.09864; pairs are formed from the two halves of a head, as in Llama.
    """
    cos_B1TE, sin_B1TE = (values.unsqueeze(1) for values in rotary)
    rotated: Tensor = _Rotate.apply(x_BHTE, cos_B1TE, sin_B1TE)  # type: ignore[no-untyped-call]
    return rotated


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = x.to(dtype).square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        products = grad_outputs[0] * normed
        weight_grad = products.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = products.mul_(weight).mean(dim=-1, keepdim=True)
        x_grad = (grad_outputs[0] * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return x_grad, weight_grad, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_outputs[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (first half, second half) rotated by its angle."""
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half].sub_(x[..., half:] * sin[..., :half])
    rotated[..., half:].add_(x[..., :half] * sin[..., half:])
    return rotated
