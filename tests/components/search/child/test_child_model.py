"""Children of a parent that is read a layer at a time, against those of one in memory."""

from pathlib import Path

import pytest
import torch

from components.core.base.errors import RecipeError
from components.core.model.checkpoint import load_model, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.layer_files import is_paged
from components.core.runtime.context import quiet_context
from components.core.runtime.placement import Placement
from components.core.text.packing import Batch
from components.search.child.child_model import Child, ChildFactory, assemble, child_layers, trainable
from components.search.child.evaluation import held_out_kl
from components.search.config import Candidates, Fusion, Space
from components.search.space.layer_space import Variant, layer_spaces
from components.search.space.subblocks import build_subblock, initialise, save_block, subblock_weights
from components.search.stages.search_step import search
from tests.components.search.stages.test_search_step import CONFIG

SPACES = layer_spaces(Space(ffn_fractions=(0.5,)), ((4, 64),) * 4)
OWN = (Variant("attention", 4), Variant("ffn", 64))
NO_ATTENTION = Variant("attention", 0)
CHOICE = [
    (Variant("attention", 1), OWN[1]),
    (NO_ATTENTION, OWN[1]),
    (NO_ATTENTION, Variant("ffn", 0)),
    (NO_ATTENTION, Variant("ffn", 32)),
]
"""Replaced, kept, empty, and a run of two FFNs around the empty layer."""


@pytest.fixture
def library(parent: TesseraForCausalLM, tmp_path: Path) -> Path:
    """The untrained variants of the choice."""
    for layer, variant in ((0, CHOICE[0][0]), (3, CHOICE[3][1])):
        own = subblock_weights(parent.model.layers[layer].state_dict(), variant.part)
        weights = initialise(own, variant, importance_I=torch.arange(64.0), head_dim=32)
        save_block(tmp_path / "library", (layer, variant), build_subblock(parent, layer, variant, weights).weights())
    return tmp_path / "library"


def child_of(parent: TesseraForCausalLM, library: Path, batches: list[Batch], fusion: Fusion) -> Child:
    return ChildFactory(parent, SPACES, [library], fusion, batches).child(CHOICE, with_dependencies=True)


def files_of(child: Child, folder: Path) -> dict[str, bytes]:
    save_model(child.model, folder, tokenizer=None, by_block=True, numbers=child.numbers)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_child_of_a_paged_parent_is_the_same_with_a_layer_in_memory(
    parent: TesseraForCausalLM,
    parent_folder: Path,
    library: Path,
    batches: list[Batch],
    tmp_path: Path,
) -> None:
    fusion = Fusion(keep_last=False)
    paged_parent = load_model(parent_folder, paged=True)
    resident, paged = (child_of(one, library, batches, fusion) for one in (parent, paged_parent))
    assert [layer.parent_layers for layer in paged.fused] == [(0,), (1, 3)]
    assert paged.dependencies == resident.dependencies != {}
    kls = [
        held_out_kl(one, (child.unfused, child.model), batches)
        for one, child in ((parent, resident), (paged_parent, paged))
    ]
    assert kls[0] == kls[1]
    assert kls[0][0] != kls[0][1]
    expected = files_of(resident, tmp_path / "resident")
    assert files_of(paged, tmp_path / "paged") == expected
    assert "layer-1-ffn.safetensors" in expected
    for model in (paged.model, paged.unfused, paged_parent):
        in_memory = [layer for layer in model.model.layers if any(not p.is_meta for p in layer.parameters())]
        assert len(in_memory) <= 1
    assert not is_paged(resident.model.model.layers)


def test_what_is_written_is_the_weights_by_their_names(
    parent: TesseraForCausalLM, library: Path, batches: list[Batch], tmp_path: Path
) -> None:
    child = child_of(parent, library, batches, Fusion(keep_last=False))
    files_of(child, tmp_path / "child")
    written = load_model(tmp_path / "child").state_dict()
    state = child.model.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())


def test_assembly_copies_no_weights_and_training_leaves_the_parent_alone(
    parent: TesseraForCausalLM, batches: list[Batch]
) -> None:
    child = assemble(parent, child_layers(parent, SPACES, [], [OWN] * 4))
    of_parent, of_child = dict(parent.named_parameters()), dict(child.named_parameters())
    assert {name: p.data_ptr() for name, p in of_child.items()} == {n: p.data_ptr() for n, p in of_parent.items()}
    before = {name: parameter.clone() for name, parameter in of_parent.items()}
    copy = trainable(child)
    copy(batches[0].input_ids_BT, labels=batches[0].input_ids_BT).loss.backward()
    torch.optim.SGD(copy.parameters(), lr=1.0).step()
    assert not torch.equal(copy.lm_head.weight, child.lm_head.weight)
    assert all(torch.equal(parameter, before[name]) for name, parameter in of_parent.items())
    assert not any(parameter.requires_grad for parameter in child.parameters())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"candidates": Candidates(count=2)}, "candidates.count=2 distils whole children"),
        ({"fusion": Fusion(timing="decoder")}, "fusion.timing=decoder times whole children"),
    ],
)
def test_what_holds_whole_children_is_refused_before_any_work(
    tmp_path: Path, parent_folder: Path, corpus: Path, changes: dict[str, object], told: str
) -> None:
    context = quiet_context(tmp_path)
    context.placement = Placement(threads=1, memory_gib=1e-6)
    with pytest.raises(RecipeError, match=told) as refused:
        search(CONFIG.model_copy(update=changes), context=context, out=tmp_path, parent=parent_folder, corpus=corpus)
    assert "placement.memory_gib" in str(refused.value)
    assert list(context.scratch.iterdir()) == []
