"""Blockwise local distillation: what is taught, and that it teaches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from components.core.model.checkpoint import load_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import Interrupted, StageContext, quiet_context
from components.core.text.corpus.encoding import load_corpus
from components.core.text.packing import Batch, PackedStream
from components.search.child.child_model import child_layers
from components.search.config import Distillation, Space
from components.search.library.calibration import observe
from components.search.library.local_distillation import distil, normalised_mse, shard_layers, variants_to_train
from components.search.space.layer_space import Variant, layer_spaces
from components.search.space.subblocks import (
    BlockKey,
    Subblock,
    build_subblock,
    initialise,
    load_block,
    save_block,
    subblock_weights,
)

SPACES = layer_spaces(Space(ffn_fractions=(0.5,)), ((4, 64),) * 4)


@pytest.fixture
def students(parent: TesseraForCausalLM) -> dict[BlockKey, Subblock]:
    """All variants of layer 1, untrained."""
    made = {}
    for layer, variant in variants_to_train(SPACES, [1]):
        own = subblock_weights(parent.model.layers[layer].state_dict(), variant.part)
        weights = initialise(own, variant, importance_I=torch.arange(64.0), head_dim=32)
        made[layer, variant] = build_subblock(parent, layer, variant, weights)
    return made


@pytest.fixture
def stream(corpus: Path, parent_folder: Path) -> PackedStream:
    return PackedStream(load_corpus(corpus, parent_folder, "train"), 32, 0)


def test_shards_share_out_all_layers_evenly() -> None:
    shards = [list(shard_layers(7, index, 3)) for index in range(3)]
    assert shards == [[0, 3, 6], [1, 4], [2, 5]]


def test_only_variants_with_weights_of_their_own_are_trained() -> None:
    assert [(layer, variant.name) for layer, variant in variants_to_train(SPACES, [0, 2])] == [
        (layer, name) for layer in (0, 2) for name in ("attention-2", "attention-1", "ffn-32")
    ]


def test_the_loss_is_one_for_nothing_and_zero_for_a_copy() -> None:
    target = torch.tensor([[3.0, 4.0]])
    assert float(normalised_mse(target, torch.zeros(1, 2))) == 1
    assert float(normalised_mse(target, target)) == 0
    assert float(normalised_mse(target, torch.tensor([[3.0, 0.0]]))) == pytest.approx(16 / 25)


def test_lessons_are_the_parents_own_activations(parent: TesseraForCausalLM, batches: list[Batch]) -> None:
    """What a variant is fed and taught is seen from outside, in the parent's hidden states."""
    batch = batches[0]
    states = parent.model(
        batch.input_ids_BT,
        position_ids=batch.position_ids_BT,
        segment_ids=batch.segment_ids_BT,
        output_hidden_states=True,
    ).hidden_states
    seen, _ = observe(parent, batch, [1])
    attention, ffn = seen[1, "attention"], seen[1, "ffn"]
    torch.testing.assert_close(attention.hidden_BTD, states[1])
    torch.testing.assert_close(ffn.hidden_BTD, states[1] + attention.output_BTD)
    torch.testing.assert_close(states[2], ffn.hidden_BTD + ffn.output_BTD)


def test_the_parents_own_weights_make_a_perfect_student(parent: TesseraForCausalLM, batches: list[Batch]) -> None:
    seen, _ = observe(parent, batches[0], [1])
    for variant in (Variant("attention", 4), Variant("ffn", 64)):
        student = build_subblock(
            parent, 1, variant, subblock_weights(parent.model.layers[1].state_dict(), variant.part)
        )
        lesson = seen[1, variant.part]
        torch.testing.assert_close(student(lesson.hidden_BTD, lesson.context), lesson.output_BTD)


def test_every_student_learns_and_the_parent_stays(
    parent: TesseraForCausalLM,
    students: dict[BlockKey, Subblock],
    stream: PackedStream,
    context: StageContext,
    tmp_path: Path,
) -> None:
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    config = Distillation(num_steps=60, learning_rate=3e-3)
    errors = distil(parent, list(students), students.__getitem__, tmp_path, stream, 4, config, context)
    for of_one in errors.values():
        assert len(of_one) == 60
        assert of_one[-1] < 0.9 * of_one[0]
    for name, tensor in parent.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_students_do_not_notice_each_other(
    parent: TesseraForCausalLM,
    students: dict[BlockKey, Subblock],
    stream: PackedStream,
    context: StageContext,
    tmp_path: Path,
) -> None:
    key = (1, Variant("ffn", 32))
    alone = {key: build_subblock(parent, 1, key[1], students[key].weights())}
    for group in (students, alone):
        distil(parent, list(group), group.__getitem__, tmp_path, stream, 4, Distillation(num_steps=3), context)
    for name, tensor in alone[key].weights().items():
        assert torch.equal(tensor, students[key].weights()[name])


def library_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def untrained(parent: TesseraForCausalLM) -> Callable[[BlockKey], Subblock]:
    """Makes variants; of a paged parent from the layer that is in memory."""

    def make(key: BlockKey) -> Subblock:
        own = subblock_weights(parent.model.layers[key[0]].state_dict(), key[1].part)
        weights = initialise(own, key[1], importance_I=torch.arange(64.0), head_dim=32)
        return build_subblock(parent, *key, weights)

    return make


@pytest.mark.parametrize("paged", [False, True])
def test_a_paged_parent_and_a_stopped_training_make_the_same_library(
    parent: TesseraForCausalLM, parent_folder: Path, stream: PackedStream, tmp_path: Path, paged: bool
) -> None:
    keys, config = variants_to_train(SPACES, [0, 2]), Distillation(num_steps=4, resume_interval_s=1e-9)
    expected = distil(
        parent, keys, untrained(parent), tmp_path / "a", stream, 4, config, quiet_context(tmp_path / "job-a")
    )
    again, context = load_model(parent_folder, paged=paged), quiet_context(tmp_path / "job-b")
    steps = iter(range(100))
    context.stopping = lambda: next(steps) >= 5  # asked before and after each save: in the third step of a layer
    with pytest.raises(Interrupted):
        distil(again, keys, untrained(again), tmp_path / "b", stream, 4, config, context)
    context.stopping = lambda: False
    found = distil(again, keys, untrained(again), tmp_path / "c", stream, 4, config, context)
    assert found == expected
    assert library_of(tmp_path / "c") == library_of(tmp_path / "a")


def test_variants_that_are_good_enough_stay_as_they_were(
    parent: TesseraForCausalLM, stream: PackedStream, context: StageContext, tmp_path: Path
) -> None:
    whole, half = (1, Variant("ffn", 64)), (1, Variant("ffn", 32))
    errors = distil(parent, [whole, half], untrained(parent), tmp_path, stream, 4, Distillation(num_steps=3), context)
    assert errors[whole] == [pytest.approx(0, abs=1e-9)]
    assert len(errors[half]) == 3
    own = parent.model.layers[1].state_dict()
    assert torch.equal(load_block([tmp_path], whole)["mlp.up_proj.weight"], own["mlp.up_proj.weight"])


def test_a_child_has_the_librarys_weights_and_elsewhere_the_parents(
    parent: TesseraForCausalLM, students: dict[BlockKey, Subblock], tmp_path: Path
) -> None:
    for key, student in students.items():
        save_block(tmp_path / "b", key, student.weights())
    own, narrow = (Variant("attention", 4), Variant("ffn", 64)), (Variant("attention", 2), Variant("ffn", 0))
    layers = child_layers(parent, SPACES, [tmp_path / "a", tmp_path / "b"], [own, narrow, own, own])
    assert (layers[1].num_key_value_heads, layers[1].intermediate_size) == (2, 0)
    assert set(layers[1].read()) == set(students[1, Variant("attention", 2)].weights())
    for name, tensor in students[1, Variant("attention", 2)].weights().items():
        assert torch.equal(layers[1].read()[name], tensor)
    for name, tensor in parent.model.layers[2].state_dict().items():
        assert torch.equal(layers[2].read()[name], tensor)


def test_a_block_that_no_library_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"layer-3/ffn-32.safetensors"):
        load_block([tmp_path], (3, Variant("ffn", 32)))
