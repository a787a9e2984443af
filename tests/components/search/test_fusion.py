"""Fused FFNs against the sum of their parts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from components.search.fusion import ChildLayer, drop_empty, fuse, fuse_runs

HIDDEN = 8


def layer(number: int, *, heads: int = 0, width: int = 4, bias: bool = False) -> ChildLayer:
    torch.manual_seed(number)
    weights = {
        "post_attention_layernorm.weight": torch.rand(HIDDEN, dtype=torch.float64) + 0.5,
        "mlp.gate_proj.weight": torch.randn(width, HIDDEN, dtype=torch.float64),
        "mlp.up_proj.weight": torch.randn(width, HIDDEN, dtype=torch.float64),
        "mlp.down_proj.weight": torch.randn(HIDDEN, width, dtype=torch.float64),
    }
    if bias:
        weights |= {f"mlp.{p}_proj.bias": torch.randn(width, dtype=torch.float64) for p in ("gate", "up")}
        weights["mlp.down_proj.bias"] = torch.randn(HIDDEN, dtype=torch.float64)
    return ChildLayer(heads, width, weights if width else {}, (number,))


def ffn_of(block: ChildLayer, x_BD: Tensor) -> Tensor:
    """The plain formula: down(silu(gate(norm(x))) * up(norm(x)))."""
    w = block.weights
    normed = x_BD * torch.rsqrt(x_BD.square().mean(-1, keepdim=True) + 1e-6) * w["post_attention_layernorm.weight"]
    zero = torch.zeros((), dtype=torch.float64)
    gate = normed @ w["mlp.gate_proj.weight"].T + w.get("mlp.gate_proj.bias", zero)
    up = normed @ w["mlp.up_proj.weight"].T + w.get("mlp.up_proj.bias", zero)
    hidden = torch.nn.functional.silu(gate) * up
    return hidden @ w["mlp.down_proj.weight"].T + w.get("mlp.down_proj.bias", zero)


@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_ffn_is_exactly_the_parallel_sum(bias: bool) -> None:
    run = [layer(n, width=width, bias=bias) for n, width in enumerate((4, 6, 2))]
    x_BD = torch.randn(5, HIDDEN, dtype=torch.float64)
    fused = fuse(run)
    assert fused.intermediate_size == 12
    torch.testing.assert_close(ffn_of(fused, x_BD), sum(ffn_of(block, x_BD) for block in run))


def test_the_fused_norm_is_the_last_layers() -> None:
    run = [layer(1), layer(2)]
    norm = "post_attention_layernorm.weight"
    assert torch.equal(fuse(run).weights[norm], run[1].weights[norm])


def test_folding_survives_a_norm_that_erases_a_channel() -> None:
    run = [layer(1), layer(2)]
    run[1].weights["post_attention_layernorm.weight"][3] = 0
    x_BD = torch.randn(5, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(ffn_of(fuse(run), x_BD), ffn_of(run[0], x_BD) + ffn_of(run[1], x_BD))


@pytest.mark.parametrize(
    ("keep_last", "expected"),
    [(True, [(0,), (1, 2), (3,), (4,), (5,), (6,)]), (False, [(0,), (1, 2, 3), (4,), (5, 6)])],
)
def test_runs_end_at_attention_and_may_keep_their_last(keep_last: bool, expected: list[tuple[int, ...]]) -> None:
    layers = [layer(n, heads=1 if n in (0, 4) else 0) for n in range(7)]
    assert [block.parent_layers for block in fuse_runs(layers, keep_last=keep_last)] == expected


def test_a_linear_ffn_ends_a_run() -> None:
    matrix = replace(layer(2), intermediate_size="linear")
    fused = fuse_runs([layer(0), layer(1), matrix, layer(3), layer(4)], keep_last=False)
    assert [found.parent_layers for found in fused] == [(0, 1), (2,), (3, 4)]


def test_empty_layers_are_dropped_and_do_not_break_a_run() -> None:
    layers = [layer(0, heads=1), layer(1), layer(2, width=0), layer(3)]
    dropped = drop_empty(layers)
    assert [block.parent_layers for block in dropped] == [(0,), (1,), (3,)]
    assert [block.parent_layers for block in fuse_runs(dropped, keep_last=False)] == [(0,), (1, 3)]
