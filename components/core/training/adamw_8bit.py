"""AdamW whose moments take a byte a value, in blocks that share a scale. Source: arXiv 2110.02861.

A block is a part of a row. So a rank that reads its rows of a resume point finds whole blocks, whatever the number of
ranks was that wrote it. Vectors (norms, biases) keep float32.

Shape letters: R rows, C columns, b blocks of a row, K columns of a block.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from components.core.training.step_memory import MOMENT_BLOCK, UPDATED_VALUES

MEAN, SQUARE = "exp_avg", "exp_avg_sq"
"""Names of the moments in the optimizer's state, as PyTorch's AdamW has them."""
SCALE = "_scale"
"""Follows the name of a moment whose values are codes: the largest magnitude of each block."""
SMALLEST_SQUARE = 1e-7
"""Least of the squares in a block, where its largest is 1. With zero in its place a step would be divided by zero."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments of 8 bits; everything is computed in float32, a piece of each matrix at a time.

    Args:
        groups: parameters, float32, sharded or not, with the `weight_decay` of each group.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float = 1e-8
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update each parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(_zero_moments(parameter))
                    state["step"] += 1
                    _update(parameter, parameter.grad, state, group)


def _zero_moments(parameter: Tensor) -> dict[str, Tensor]:
    """The state before the first step; sharded as the parameter is."""
    state = {"step": torch.zeros(())}
    for name in (MEAN, SQUARE):
        if parameter.ndim < 2:
            state[name] = torch.zeros_like(parameter)
        else:
            num_blocks = -(-parameter.shape[1] // MOMENT_BLOCK)
            state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[name + SCALE] = torch.zeros_like(parameter[:, :num_blocks])
    return state


def _update(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One step of a parameter, or of this rank's rows of it. Source: arXiv 1711.05101, algorithm 2."""
    step, rate, (beta1, beta2) = float(state["step"]), float(group["lr"]), group["betas"]
    weights, gradients = _own_rows(parameter), _own_rows(gradient)
    means, squares = (_Moment.of(state, name) for name in (MEAN, SQUARE))
    num_rows = max(1, UPDATED_VALUES * max(1, len(weights)) // max(1, weights.numel()))
    for start in range(0, len(weights), num_rows):
        rows = slice(start, start + num_rows)
        own = gradients[rows]
        mean = means.read(rows).lerp_(own, 1 - beta1)
        square = squares.read(rows).mul_(beta2).addcmul_(own, own, value=1 - beta2)
        means.write(rows, mean)
        squares.write(rows, square)
        root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        weights[rows].mul_(1 - rate * group["weight_decay"]).addcdiv_(mean, root, value=-rate / (1 - beta1**step))


@dataclass(frozen=True)
class _Moment:
    """A moment of some rows: codes with scales, or the values themselves, which are changed in place."""

    values_RC: Tensor
    scales_Rb: Tensor | None
    signed: bool

    @classmethod
    def of(cls, state: dict[str, Tensor], name: str) -> "_Moment":
        scales = state.get(name + SCALE)
        return cls(_own_rows(state[name]), None if scales is None else _own_rows(scales), name == MEAN)

    def read(self, rows: slice) -> Tensor:
        """The values of some rows."""
        values_RC = self.values_RC[rows]
        if self.scales_Rb is None:
            return values_RC
        scales_RC = self.scales_Rb[rows].repeat_interleave(MOMENT_BLOCK, dim=1)[:, : values_RC.shape[1]]
        return _code_values(self.signed, values_RC.device)[values_RC.int()].mul_(scales_RC)

    def write(self, rows: slice, values_RC: Tensor) -> None:
        """Keep the values of some rows, each as the code whose value is nearest."""
        if self.scales_Rb is None:
            return
        num_columns = values_RC.shape[1]
        if num_columns % MOMENT_BLOCK:
            values_RC = F.pad(values_RC, (0, -num_columns % MOMENT_BLOCK))
        blocks_RbK = values_RC.unflatten(1, (-1, MOMENT_BLOCK))
        scales_Rb = blocks_RbK.abs().amax(dim=2)
        values = _code_values(self.signed, values_RC.device)
        scaled_RbK = blocks_RbK / scales_Rb.clamp(min=torch.finfo().tiny)[:, :, None]
        codes_RbK = torch.bucketize(scaled_RbK, (values[1:] + values[:-1]) / 2, out_int32=True)
        self.values_RC[rows] = codes_RbK.flatten(1)[:, :num_columns].to(torch.uint8)
        self.scales_Rb[rows] = scales_Rb


@functools.cache
def _code_values(signed: bool, device: torch.device) -> Tensor:
    """The value of each code, ascending, from the largest magnitude 1 down to 1e-7.

    Seven powers of ten, and within each as many equal steps as fit: twice as many as in the next smaller one. Source:
    arXiv 2110.02861, section 2.1.
    """
    values = [0.0 if signed else SMALLEST_SQUARE, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 1 + 2 ** (power + (not signed)), dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)).tolist()
        values += middles + ([-middle for middle in middles] if signed else [])
    return torch.tensor(sorted(values), device=device)


def _own_rows(tensor: Tensor) -> Tensor:
    """The part of this rank; all of what is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
