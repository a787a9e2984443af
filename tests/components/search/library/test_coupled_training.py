"""Attention and FFN of a layer trained together, against whole models that have both."""

from pathlib import Path

import pytest
import torch

from components.core.model.checkpoint import load_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import quiet_context
from components.core.text.packing import Batch, PackedStream, load_corpus
from components.search.child.assemble import assemble, child_layers
from components.search.config import Coupled, Space
from components.search.library.coupled_training import couple, pairs_to_couple
from components.search.space.build import build_subblock
from components.search.space.layer_space import Variant, layer_spaces
from components.search.space.library_files import load_block, save_block
from components.search.space.variant_weights import initialise, subblock_weights

SPACES = layer_spaces(Space(ffn_fractions=(0.5,)), ((4, 64),) * 4)
OWN = (Variant("attention", 4), Variant("ffn", 64))
PAIRS = {1: (Variant("attention", 0), Variant("ffn", 32)), 2: (Variant("attention", 1), Variant("ffn", 32))}
CHOICE = [OWN, PAIRS[1], PAIRS[2], OWN]


@pytest.fixture
def library(parent: TesseraForCausalLM, tmp_path: Path) -> Path:
    """The untrained variants."""
    for layer, pair in PAIRS.items():
        for variant in pair:
            if not variant.is_no_op:
                own = subblock_weights(parent.model.layers[layer].state_dict(), variant.part)
                weights = initialise(own, variant, importance_I=torch.arange(64.0), head_dim=32)
                save_block(
                    tmp_path / "library", (layer, variant), build_subblock(parent, layer, variant, weights).weights()
                )
    return tmp_path / "library"


def added_by_layer_1(model: TesseraForCausalLM, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        states = model.model(
            batch.input_ids_BT,
            position_ids=batch.position_ids_BT,
            segment_ids=batch.segment_ids_BT,
            output_hidden_states=True,
        ).hidden_states
    assert states is not None
    added_ND: torch.Tensor = (states[2] - states[1])[batch.segment_ids_BT > 0]
    return added_ND


def error_of_layer_1(parent: TesseraForCausalLM, folders: list[Path], batch: Batch) -> float:
    """Normalised, of a child that has the pair in layer 1 and is the parent elsewhere."""
    child = assemble(parent, child_layers(parent, SPACES, folders, [OWN, PAIRS[1], OWN, OWN]))
    wanted, made = added_by_layer_1(parent, batch), added_by_layer_1(child, batch)
    return float((wanted - made).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("paged", [False, True])
def test_a_pair_learns_what_the_parents_layer_adds(
    parent: TesseraForCausalLM, parent_folder: Path, corpus: Path, library: Path, tmp_path: Path, paged: bool
) -> None:
    stream = PackedStream(load_corpus(corpus, parent_folder, "train"), 32, 0)
    config, folder = Coupled(num_steps=40, learning_rate=3e-3), tmp_path / "coupled"
    teacher = load_model(parent_folder, paged=paged).requires_grad_(False)
    errors = couple(teacher, PAIRS, [library], folder, stream, 4, config, quiet_context(tmp_path / "job"))
    first = stream.batch(0, 4)
    before = error_of_layer_1(parent, [library], first)
    assert errors[1][0] == pytest.approx(before, rel=1e-4)
    assert error_of_layer_1(parent, [folder, library], first) < 0.8 * before
    assert errors[2][-1] < errors[2][0]
    trained = load_block([folder, library], (1, PAIRS[1][1]))
    assert not torch.equal(trained["mlp.up_proj.weight"], load_block([library], (1, PAIRS[1][1]))["mlp.up_proj.weight"])
    assert sorted(path.name for path in folder.rglob("*.safetensors")) == [
        "attention-1.safetensors",
        *["ffn-32.safetensors"] * 2,
    ]


def test_only_layers_that_lose_both_of_the_parents_parts_are_coupled() -> None:
    empty = (Variant("attention", 0), Variant("ffn", 0))
    alone = (Variant("attention", 1), Variant("ffn", 64))
    assert pairs_to_couple(SPACES, [alone, PAIRS[1], empty, OWN]) == {1: PAIRS[1]}
