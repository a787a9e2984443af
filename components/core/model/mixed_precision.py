"""Weights at one precision, arithmetic at another: they are cast a piece at a time, as they are used.

A bfloat16 model so takes two bytes a weight also where it is computed in float32. The precision of what is computed is
that of the residual stream, which the embedding begins. Under autocast, torch itself decides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAST_VALUES = 1 << 24
"""Values of a matrix that are cast at once: 64 MiB in float32."""


class Linear(nn.Linear):
    """A product at the precision of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """The product; `input` is any float tensor whose last dimension fits."""
        if self.weight.dtype == input.dtype or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        pieces = self.weight.split(max(1, CAST_VALUES // self.in_features))
        products = [F.linear(input, piece.to(input.dtype)) for piece in pieces]
        output = torch.cat(products, dim=-1) if len(products) > 1 else products[0]
        return output if self.bias is None else output + self.bias.to(input.dtype)


class Embedding(nn.Embedding):
    """Rows of the embedding at the precision of what is computed.

    Attributes:
        computes_in: that precision; the weights' own where None.
    """

    computes_in: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The rows of these token ids."""
        rows = super().forward(input)
        return rows if self.computes_in is None else rows.to(self.computes_in)
