"""Channel contribution against zeroing a channel, token by token."""

import pytest
import torch

from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.packing import Batch
from components.search.library.activations import observe
from components.search.library.importance import channel_contributions, share_of_top


def test_contribution_is_how_far_zeroing_a_channel_moves_the_output(
    parent: TesseraForCausalLM, batches: list[Batch], context: StageContext
) -> None:
    contributions = channel_contributions(parent, batches[:1], context)
    mask_BT = batches[0].segment_ids_BT > 0
    layer, mlp = 2, parent.model.layers[2].mlp
    seen, _ = observe(parent, batches[0], [layer])
    before_ND = seen[layer, "ffn"].output_BTD[mask_BT]
    for channel in (0, 17, 63):
        kept = mlp.down_proj.weight[:, channel].clone()
        mlp.down_proj.weight[:, channel] = 0
        normed = parent.model.layers[layer].post_attention_layernorm(seen[layer, "ffn"].hidden_BTD)
        moved_N = (mlp(normed)[mask_BT] - before_ND).norm(dim=-1)
        mlp.down_proj.weight[:, channel] = kept
        assert float(contributions[layer][channel]) == pytest.approx(float(moved_N.mean()), rel=1e-4)


def test_padding_does_not_count(parent: TesseraForCausalLM, batches: list[Batch], context: StageContext) -> None:
    batch = batches[0]
    assert bool((batch.segment_ids_BT == 0).any()), "the fixture has padding"
    scrambled = batch.input_ids_BT.clone()
    scrambled[batch.segment_ids_BT == 0] = 5
    other = Batch(scrambled, batch.labels_BT, batch.position_ids_BT, batch.segment_ids_BT)
    expected, found = (channel_contributions(parent, [b], context) for b in (batch, other))
    for layer, values_I in expected.items():
        torch.testing.assert_close(found[layer], values_I)


def test_share_of_top_by_hand() -> None:
    assert share_of_top(torch.tensor([1.0, 4.0, 3.0, 2.0]), 0.5) == pytest.approx(0.7)
