"""What the peers of the search leave out, against brute force on a tiny model."""

import itertools
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.core.model.decoder import TesseraForCausalLM
from components.core.text.example import Example
from components.core.text.packing import Batch, pack_rows
from tests.bench.pruning import (
    activation_importance,
    block_influences,
    keep_groups,
    layer_kls,
    least,
    prune_width,
    without_layers,
)
from tests.components.core import tiny_models

HEADS, GROUPS, HEAD_DIM, WIDTH = 4, 2, 32, 24


@pytest.fixture(scope="module")
def parent() -> TesseraForCausalLM:
    return tiny_models.heterogeneous(0, [(GROUPS, WIDTH)] * 3).requires_grad_(False)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two rows of two documents, the second with padding."""
    torch.manual_seed(1)
    rows = [
        [Example(torch.randint(1, 50, (length,)).tolist(), [True] * length) for length in lengths]
        for lengths in ((7, 5), (4, 3))
    ]
    return pack_rows(rows, seq_len=12, pad=0)


def documents(batch: Batch) -> list[tuple[int, list[int]]]:
    """Row and token ids of each document, one by one."""
    found = []
    for row, (ids, segments) in enumerate(zip(batch.input_ids_BT, batch.segment_ids_BT, strict=True)):
        found += [(row, ids[segments == segment].tolist()) for segment in range(1, int(segments.max()) + 1)]
    return found


def states_of(model: TesseraForCausalLM, ids: list[int], dropped: int | None = None) -> list[Tensor]:
    """Residual stream of one document before the first layer and after each, layer by layer."""
    x_1TD = model.model.embed_tokens(torch.tensor([ids]))
    rotary = model.model.rotary_emb(x_1TD, torch.arange(len(ids))[None])
    states = [x_1TD[0]]
    for number, layer in enumerate(model.model.layers):
        if number != dropped:
            x_1TD = layer(x_1TD, rotary, None, None)
        states.append(x_1TD[0])
    return states


def log_probabilities(model: TesseraForCausalLM, ids: list[int], dropped: int | None = None) -> Tensor:
    return F.log_softmax(model.lm_head(model.model.norm(states_of(model, ids, dropped)[-1])), dim=-1)


def test_a_layers_kl_is_that_of_the_parent_from_the_parent_without_it(parent: TesseraForCausalLM, batch: Batch) -> None:
    for number, found in enumerate(layer_kls(parent, [batch])):
        kls = []
        for _, ids in documents(batch):
            whole, without = log_probabilities(parent, ids)[:-1], log_probabilities(parent, ids, number)[:-1]
            kls += (whole.exp() * (whole - without)).sum(dim=-1).tolist()
        assert found == pytest.approx(math.fsum(kls) / len(kls), rel=1e-4)


def test_block_influence_is_the_mean_angle_between_input_and_output(parent: TesseraForCausalLM, batch: Batch) -> None:
    for number, found in enumerate(block_influences(parent, [batch])):
        distances = []
        for _, ids in documents(batch):
            before, after = states_of(parent, ids)[number : number + 2]
            for x, y in zip(before.tolist(), after.tolist(), strict=True):
                dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
                distances.append(1 - dot / math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y)))
        assert found == pytest.approx(math.fsum(distances) / len(distances), rel=1e-4)


def test_the_least_are_dropped() -> None:
    values = [0.5, 0.1, 0.4, 0.1]
    assert least(values, 3) == min(
        map(set, itertools.combinations(range(4), 3)), key=lambda chosen: sum(values[number] for number in chosen)
    )
    assert least(values, 1) == {1}


def test_without_layers_the_others_stay_as_they_are(parent: TesseraForCausalLM, batch: Batch) -> None:
    _, ids = documents(batch)[0]
    child = without_layers(parent, {1})
    assert child.config.parent_layers == [2, 3]
    torch.testing.assert_close(child(torch.tensor([ids])).logits[0].log_softmax(-1), log_probabilities(parent, ids, 1))


def test_importance_is_the_norm_over_rows_of_mean_activations(parent: TesseraForCausalLM, batch: Batch) -> None:
    found = activation_importance(parent, [batch.rows(0, 1), batch.rows(1, 2)])  # rows in one batch or in two
    layer, number = parent.model.layers[1], 1
    neurons = [torch.zeros(0, WIDTH), torch.zeros(0, WIDTH)]
    groups = [torch.zeros(0, GROUPS), torch.zeros(0, GROUPS)]
    for row, ids in documents(batch):
        x_TD = states_of(parent, ids)[number]
        rotary = parent.model.rotary_emb(x_TD[None], torch.arange(len(ids))[None])
        arguments = (layer.input_layernorm(x_TD[None]), rotary, None, None)
        mixed_1TD = layer.self_attn(*arguments)
        unprojected = deepcopy(layer.self_attn)
        unprojected.o_proj = nn.Identity()
        norms_TH = unprojected(*arguments)[0].unflatten(-1, (HEADS, HEAD_DIM)).square().sum(dim=-1).sqrt()
        of_groups = torch.stack([norms_TH[:, :2].sum(dim=1), norms_TH[:, 2:].sum(dim=1)], dim=1)
        groups[row] = torch.cat([groups[row], of_groups])
        middle = layer.post_attention_layernorm(x_TD + mixed_1TD[0])
        gated = F.silu(middle @ layer.mlp.gate_proj.weight.T) * (middle @ layer.mlp.up_proj.weight.T)
        neurons[row] = torch.cat([neurons[row], gated.abs()])
    for kind, rows in ((found.neurons[number], neurons), (found.groups[number], groups)):
        expected = torch.stack([row.mean(dim=0) for row in rows]).square().sum(dim=0).sqrt()
        torch.testing.assert_close(kind.float(), expected, rtol=1e-3, atol=1e-4)


def test_groups_that_go_are_as_if_their_output_were_zero(parent: TesseraForCausalLM, batch: Batch) -> None:
    """Pruned to one group and the neurons that count, against the whole model with the others' columns set to zero."""
    importance = activation_importance(parent, [batch])
    child = prune_width(parent, importance, num_groups=1, intermediate_size=8)
    masked = deepcopy(parent)
    for number, layer in enumerate(masked.model.layers):
        kept = int(importance.groups[number].argmax())
        columns_DGX = layer.self_attn.o_proj.weight.data.unflatten(1, (GROUPS, -1))
        columns_DGX[:, [group for group in range(GROUPS) if group != kept]] = 0
        lost = importance.neurons[number].argsort()[: WIDTH - 8]
        layer.mlp.down_proj.weight.data[:, lost] = 0
    _, ids = documents(batch)[0]
    torch.testing.assert_close(child(torch.tensor([ids])).logits, masked(torch.tensor([ids])).logits)
    assert child.config.num_attention_heads == 2
    attention, ffn = 2 * 64 * 2 * HEAD_DIM + 2 * 64 * HEAD_DIM, 3 * 64 * 8
    assert child.num_parameters() == 3 * (attention + ffn + 2 * 64) + 2 * 64 * tiny_models.VOCAB_SIZE + 64


def test_query_heads_stay_with_the_group_that_they_read() -> None:
    rows = torch.arange(HEADS * HEAD_DIM, dtype=torch.float32)
    layer = {
        "self_attn.q_proj.weight": rows[:, None],
        "self_attn.k_proj.weight": rows[: GROUPS * HEAD_DIM, None],
        "self_attn.v_proj.bias": rows[: GROUPS * HEAD_DIM],
        "self_attn.o_proj.weight": rows[None],
        "input_layernorm.weight": rows,
    }
    kept = keep_groups(layer, torch.tensor([1]), GROUPS)
    assert kept["self_attn.q_proj.weight"][:, 0].tolist() == list(range(2 * HEAD_DIM, 4 * HEAD_DIM))
    assert kept["self_attn.k_proj.weight"][:, 0].tolist() == list(range(HEAD_DIM, 2 * HEAD_DIM))
    assert kept["self_attn.v_proj.bias"].tolist() == list(range(HEAD_DIM, 2 * HEAD_DIM))
    assert kept["self_attn.o_proj.weight"][0].tolist() == list(range(2 * HEAD_DIM, 4 * HEAD_DIM))
    assert kept["input_layernorm.weight"] is rows
