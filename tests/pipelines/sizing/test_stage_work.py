"""What each stage of a recipe takes, against the numbers of its settings; and what does not fit, with a way out."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.core.model.accelerators import DEVICES
from components.core.model.architecture import Architecture
from components.core.model.flops import block_weights, forward_flops, training_flops
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.registry import STAGES
from pipelines.recipe.schema import Recipe, load_recipe
from pipelines.sizing.capacity import find_misfits
from pipelines.sizing.machine import Machine, named_machine
from pipelines.sizing.stage_work import WORK, StageWork, models_of, recipe_work
from tests.components.core.llama_8b import LLAMA_8B

DEMO = Path(__file__).parents[3] / "pipelines" / "recipes" / "demo.yaml"
HERE = Machine(DEVICES["CPU"], None, 0, 2, 16 << 30)


def demo_work() -> tuple[Architecture, Architecture, dict[str, StageWork]]:
    models, work = recipe_work(load_recipe(DEMO), HERE)
    assert models is not None
    return models.parent, models.child, work


def test_every_stage_has_work() -> None:
    assert WORK.keys() == STAGES.keys()
    _, _, work = demo_work()
    assert list(work) == [task.label for task in llama_nemotron(load_recipe(DEMO)).items()]
    assert all(each.memory_bytes > 0 and each.seconds is not None for each in work.values())


def test_a_training_takes_its_rows_and_a_distillation_its_teacher_too() -> None:
    parent, child, work = demo_work()
    tokens = 420 * 8 * 128
    assert work["parent"].tokens == tokens
    assert work["parent"].flops == training_flops(parent, tokens, 128)
    assert work["parent"].disk_bytes == 4 * parent.parameters
    tokens = 400 * 8 * 128
    assert work["distill"].flops == training_flops(child, tokens, 128) + forward_flops(parent, tokens, 128)
    assert work["distill"].disk_bytes == 4 * child.parameters


def test_a_library_is_the_weights_of_its_variants() -> None:
    parent, _, work = demo_work()
    a_layer = 0
    for heads in (2, 1):
        a_layer += 2 * 128 * (128 + heads * 32)
    a_layer += 3 * 128 * 128  # the FFN of half the channels
    assert block_weights(parent, parent.blocks[0]) == 2 * 128 * (128 + 128) + 3 * 128 * 256
    assert work["search/library-0"].disk_bytes + work["search/library-1"].disk_bytes == 4 * 12 * a_layer


def test_longer_answers_take_longer() -> None:
    recipe = load_recipe(DEMO)
    longer = load_recipe(DEMO, ["rl.max_tokens=400"])
    (_, short), (_, long) = recipe_work(recipe, HERE), recipe_work(longer, HERE)
    assert long["rl"].seconds is not None
    assert short["rl"].seconds is not None
    assert long["rl"].seconds > 4 * short["rl"].seconds
    assert long["rl"].tokens > short["rl"].tokens


def test_a_parent_is_whole_up_to_half_of_its_gpu_whatever_the_node_has(tmp_path: Path) -> None:
    recipe = recipe_of_8b(tmp_path, search={}, placement={"gpus": 1, "memory_gib": 4})
    weights = 2 * Architecture.from_config(LLAMA_8B).parameters

    def importance(gpu_bytes: int) -> int:
        gpu = DEVICES["H100"].model_copy(update={"memory_bytes": gpu_bytes})
        _, work = recipe_work(recipe, Machine(DEVICES["CPU"], gpu, 1, 2, 4 << 30))
        return work["search/importance"].memory_bytes

    assert weights < importance(2 * weights) < 1.1 * weights
    assert importance(2 * weights - 1) < 0.25 * weights  # two layers, embedding and head


def recipe_of_8b(folder: Path, **sections: Any) -> Recipe:
    """A recipe with a parent of 8 B, of which only the configuration is there."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA_8B))
    values = {"name": "large", "parent": "./model", "corpus": "./text.txt", **sections}
    left_out = dict.fromkeys(("search", "distill", "sft", "rl", "eval", "deploy"))
    (folder / "large.yaml").write_text(yaml.safe_dump(left_out | values))
    return load_recipe(folder / "large.yaml")


def hints(recipe: Recipe, machine: Machine) -> list[str]:
    models, work = recipe_work(recipe, machine)
    assert models is not None
    return [f"{misfit.message}; {misfit.hint}" for misfit in find_misfits(recipe, models, work, machine, None)]


def test_an_8b_does_not_train_on_one_gpu_and_the_plan_says_on_how_many(tmp_path: Path) -> None:
    training = {"num_steps": 10, "global_batch_size": 64, "micro_batch_size": 8, "seq_len": 4096}
    recipe = recipe_of_8b(tmp_path, pretrain=training)
    (told,) = [hint for hint in hints(recipe, named_machine("H100:1")) if hint.startswith("pretrain")]
    assert "pretrain needs" in told
    assert "on each device, and H100 has 76.00 GiB" in told
    assert "GPUs, with pretrain.activation_checkpointing" in told


def test_moments_of_8_bits_let_a_3b_train_on_a_gpu_of_48_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LLAMA_8B, "num_hidden_layers", 10)
    training = {"num_steps": 10, "global_batch_size": 64, "micro_batch_size": 8, "seq_len": 4096}
    recipe = recipe_of_8b(tmp_path, pretrain=training)
    (told,) = [hint for hint in hints(recipe, named_machine("L40S:1")) if hint.startswith("pretrain")]
    assert "set pretrain.optimizer to adamw_8bit, pretrain.activation_checkpointing to true" in told
    small = {**training, "optimizer": "adamw_8bit", "activation_checkpointing": True, "micro_batch_size": 1}
    found = hints(recipe_of_8b(tmp_path / "small", pretrain=small), named_machine("L40S:1"))
    assert [hint for hint in found if hint.startswith("pretrain")] == []


def test_a_model_that_is_offloaded_takes_the_memory_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LLAMA_8B, "num_hidden_layers", 20)
    training = {"num_steps": 10, "micro_batch_size": 1, "seq_len": 2048, "activation_checkpointing": True}
    place = {"gpus": 1, "offload": True, "memory_gib": 128}

    def told(name: str, **changes: Any) -> list[str]:
        recipe = recipe_of_8b(tmp_path / name, pretrain={**training, "placement": {**place, **changes}})
        return [hint for hint in hints(recipe, named_machine("L40S:1")) if hint.startswith("pretrain")]

    (whole,) = told("whole", offload=False)
    assert "slower: pretrain.placement.offload" in whole
    assert told("offloaded") == []
    (small,) = told("small", memory_gib=32)
    needed = 16 * Architecture.from_config(LLAMA_8B).parameters / 2**30  # weights, gradients, two moments in float32
    assert small.startswith(f"pretrain offloads {needed:.2f} GiB, and placement.memory_gib is 32")


def test_a_smaller_micro_batch_is_the_first_way_out(tmp_path: Path) -> None:
    training = {"num_steps": 10, "global_batch_size": 64, "micro_batch_size": 64, "seq_len": 512}
    recipe = recipe_of_8b(tmp_path, pretrain=training)
    found = [hint for hint in hints(recipe, named_machine("H200:8")) if hint.startswith("pretrain")]
    assert found == []
    larger = recipe.model_copy(
        update={"pretrain": recipe.pretrain and recipe.pretrain.model_copy(update={"global_batch_size": 512})}
    )
    (told,) = [hint for hint in hints(larger, named_machine("H200:8")) if hint.startswith("pretrain")]
    assert "set pretrain.micro_batch_size to" in told


def test_memory_that_the_machine_has_is_named(tmp_path: Path) -> None:
    training = {"num_steps": 10, "global_batch_size": 2, "micro_batch_size": 2, "seq_len": 128}
    recipe = recipe_of_8b(tmp_path, pretrain=training)
    large = Machine(DEVICES["CPU"], None, 0, 64, 512 << 30)
    (told,) = [hint for hint in hints(recipe, large) if hint.startswith("pretrain")]
    assert "placement.memory_gib is 8" in told
    assert "this machine has 512 GiB" in told


def test_results_that_the_disk_is_too_small_for(tmp_path: Path) -> None:
    recipe = recipe_of_8b(tmp_path, pretrain={"num_steps": 1})
    models, work = recipe_work(recipe, HERE)
    assert models is not None
    (told,) = [m for m in find_misfits(recipe, models, work, named_machine("B200:64"), 1 << 30) if "free" in m.message]
    assert "the run writes about 14.96 GiB, and 1.00 GiB are free" in told.message


def test_a_parent_in_a_store_is_not_known_here(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("name: there\nparent: run://demo-1/distilled\n")
    assert models_of(load_recipe(tmp_path / "there.yaml")) is None


@pytest.mark.parametrize("device", ["H100:8", "CPU:4", "B200:1"])
def test_each_recipe_can_be_planned_for_other_devices(device: str) -> None:
    _, work = recipe_work(load_recipe(DEMO), named_machine(device))
    assert all(each.seconds is not None for each in work.values())
