"""Fused FFNs against the sum of their parts."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from components.core.model.decoder import TesseraForCausalLM
from components.core.text.packing import Batch
from components.search.child.child_model import assemble
from components.search.child.ffn_fusion import (
    ChildLayer,
    choose_groups,
    drop_empty,
    ffn_dependencies,
    fuse,
    fuse_layers,
)
from components.search.config import Fusion
from components.search.space.subblocks import subblock_weights

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
    return ChildLayer(heads, width, lambda: weights if width else {}, (number,))


def ffn_of(block: ChildLayer, x_BD: Tensor) -> Tensor:
    """The plain formula: down(silu(gate(norm(x))) * up(norm(x)))."""
    w = block.read()
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
    assert torch.equal(fuse(run).read()[norm], run[1].read()[norm])


def test_folding_survives_a_norm_that_erases_a_channel() -> None:
    run = [layer(1), layer(2)]
    run[1].read()["post_attention_layernorm.weight"][3] = 0
    x_BD = torch.randn(5, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(ffn_of(fuse(run), x_BD), ffn_of(run[0], x_BD) + ffn_of(run[1], x_BD))


@pytest.mark.parametrize(
    ("keep_last", "expected"),
    [(True, [(0,), (1, 2), (3,), (4,), (5,), (6,)]), (False, [(0,), (1, 2, 3), (4,), (5, 6)])],
)
def test_runs_end_at_attention_and_may_keep_their_last(keep_last: bool, expected: list[tuple[int, ...]]) -> None:
    layers = [layer(n, heads=1 if n in (0, 4) else 0) for n in range(7)]
    assert [block.parent_layers for block in fuse_layers(layers, Fusion(keep_last=keep_last))] == expected


def test_empty_layers_are_dropped_and_do_not_break_a_run() -> None:
    layers = [layer(0, heads=1), layer(1), layer(2, width=0), layer(3)]
    assert [block.parent_layers for block in drop_empty(layers)] == [(0,), (1,), (3,)]
    assert [block.parent_layers for block in fuse_layers(layers, Fusion(keep_last=False))] == [(0,), (1, 3)]


def test_a_linear_ffn_ends_a_run() -> None:
    linear = ChildLayer(0, "linear", lambda: {"mlp.linear.weight": torch.eye(HIDDEN)}, (2,))
    layers = [layer(0), layer(1), linear, layer(3), layer(4)]
    assert [block.parent_layers for block in fuse_layers(layers, Fusion(keep_last=False))] == [(0, 1), (2,), (3, 4)]


LIMITS = st.builds(
    Fusion,
    keep_last=st.booleans(),
    max_channels=st.none() | st.integers(1, 12),
    max_dependency=st.none() | st.floats(0, 1),
)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7), LIMITS, st.lists(st.floats(0, 1), min_size=21, max_size=21))
def test_groups_are_the_fewest_within_the_limits_and_then_the_least_dependent(
    widths: list[int], config: Fusion, distances: list[float]
) -> None:
    run = [layer(n, width=width) for n, width in enumerate(widths)]
    dependencies = dict(zip(itertools.combinations(range(7), 2), distances, strict=True))

    def cost(cuts: tuple[int, ...]) -> tuple[int, float] | None:
        """Groups, and what depends within them; None where a limit is exceeded or the last one is not left alone."""
        groups = [range(a, b) for a, b in itertools.pairwise((0, *cuts, len(run)))]
        if config.keep_last and len(groups[-1]) > 1:
            return None
        total = 0.0
        for group in groups:
            within = [dependencies[pair] for pair in itertools.combinations(group, 2)]
            total += sum(within)
            too_wide = config.max_channels and sum(widths[n] for n in group) > config.max_channels
            too_close = config.max_dependency is not None and max(within, default=0) > config.max_dependency
            if len(group) > 1 and (too_wide or too_close):
                return None
        return len(groups), total

    every = [cuts for size in range(len(run)) for cuts in itertools.combinations(range(1, len(run)), size)]
    best = min(found for found in map(cost, every) if found is not None)
    groups = choose_groups(run, config, dependencies)
    cuts = tuple(itertools.accumulate(len(group) for group in groups))[:-1]
    assert [block for group in groups for block in group] == run
    assert cost(cuts) == pytest.approx(best)


def without_attention(parent: TesseraForCausalLM, first: int) -> list[ChildLayer]:
    """The parent's layers, those from `first` on without their attention."""
    found = []
    for number, block in enumerate(parent.model.layers):
        state = block.state_dict()
        weights = subblock_weights(state, "ffn") | (subblock_weights(state, "attention") if number < first else {})
        found.append(ChildLayer(4 if number < first else 0, 64, partial(dict, weights), (number,)))
    return found


def test_dependency_is_what_removing_an_earlier_ffn_changes(parent: TesseraForCausalLM, batches: list[Batch]) -> None:
    layers = without_attention(parent, 1)
    found = ffn_dependencies(assemble(parent, layers), layers, batches)

    def added(removed: int | None, last: int, batch: Batch) -> Tensor:
        """What FFN `last` adds, by whole models: the difference of one that ends with it and one that ends before."""
        kept = [block for block in layers[: last + 1] if block.parent_layers != (removed,)]
        ends = []
        for some in (kept, kept[:-1]):
            model = assemble(parent, some)
            model.model.norm = torch.nn.Identity()  # type: ignore[assignment]
            states = model.model(
                batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT
            )
            ends.append(states.last_hidden_state[batch.segment_ids_BT > 0])
        difference: Tensor = ends[0] - ends[1]
        return difference

    assert found.keys() == {(1, 2), (1, 3), (2, 3)}
    with torch.no_grad():
        for (first, second), distance in found.items():
            whole = torch.cat([added(None, second, batch) for batch in batches])
            without = torch.cat([added(first, second, batch) for batch in batches])
            expected = 1 - torch.nn.functional.cosine_similarity(whole, without, dim=-1).mean()
            assert distance == pytest.approx(float(expected), abs=1e-4)
            assert distance > 0.01
