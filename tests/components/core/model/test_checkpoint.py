import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from components.core.base.errors import CheckpointError
from components.core.model import checkpoint
from components.core.model.architecture import Architecture, BlockConfig
from components.core.model.checkpoint import load_model, model_config, read_weights, save_model
from components.core.model.decoder import TesseraConfig, TesseraForCausalLM
from components.core.model.inspection import check_checkpoint, read_config
from tests.components.core.dense_models import ROPES, VARIETIES, dense_model, rope_model, twin, variety

CHILD = ((4, 80), (None, 96), (1, None), (None, None), (2, 17))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(2, 42).reshape(2, 20)).logits
    return found


def child_of(family: str, layers: Any = CHILD, **changes: Any) -> TesseraForCausalLM:
    """A model of unlike layers, its configuration derived from a dense one of the family."""
    values = dense_model(family, **changes).config.to_dict()
    blocks = tuple(BlockConfig(num_key_value_heads=heads, intermediate_size=width) for heads, width in layers)
    shape = Architecture.from_config(values).model_copy(update={"blocks": blocks})
    values = {
        **model_config(values).to_dict(),
        "block_configs": shape.block_configs(),
        "num_hidden_layers": len(blocks),
    }
    torch.manual_seed(2)
    model = TesseraForCausalLM(model_config(values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.train(False)
    return model


def read_as_it_stands(folder: Path) -> TesseraForCausalLM:
    """What a reader that knows nothing of ours makes of the configuration and the weights."""
    model = TesseraForCausalLM(TesseraConfig(**read_config(folder)))
    model.load_state_dict(
        {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    )
    model.train(False)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


def digest_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", VARIETIES)
def test_what_transformers_wrote_comes_back_as_a_folder_of_the_same_family(name: str, tmp_path: Path) -> None:
    dense = variety(name)
    dense.save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense")
    assert torch.equal(logits(model), logits(dense))
    save_model(model, tmp_path / "again", tokenizer=None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is type(dense)
    assert torch.equal(logits(again), logits(dense))
    assert set(load_file(tmp_path / "again/model.safetensors")) == set(load_file(tmp_path / "dense/model.safetensors"))


@pytest.mark.parametrize("name", VARIETIES)
def test_a_folder_with_a_file_for_each_subblock_is_read_by_us_and_by_transformers(name: str, tmp_path: Path) -> None:
    dense = variety(name)
    dense.save_pretrained(tmp_path / "dense")
    save_model(load_model(tmp_path / "dense"), tmp_path / "parts", tokenizer=None, by_block=True)
    assert (tmp_path / "parts" / "layer-0-attention.safetensors").is_file()
    assert torch.equal(logits(load_model(tmp_path / "parts")), logits(dense))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "parts")), logits(dense))


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3, 4), (0, 2, 3, 7, 8), (3, 4, 5, 6, 11)])
@pytest.mark.parametrize("paged", [False, True])
def test_layers_may_keep_the_numbers_of_another_model(numbers: tuple[int, ...], paged: bool, tmp_path: Path) -> None:
    child = child_of("qwen2", [(4, 80), (None, 96), (1, None), (2, 17), (1, 80)])
    child.config.parent_layers = [number + 1 for number in numbers]
    save_model(child, tmp_path / "child", tokenizer=None, by_block=True, numbers=numbers)
    assert (tmp_path / "child" / f"layer-{numbers[0]}-attention.safetensors").is_file()
    shape = Architecture.from_config(read_config(tmp_path / "child"))
    assert shape.blocks == Architecture.from_config(child.config.to_dict()).blocks
    again = load_model(tmp_path / "child", paged=paged)
    assert torch.equal(logits(again), logits(child))
    assert again.config.to_dict()["parent_layers"] == child.config.parent_layers
    assert dict(read_weights(tmp_path / "child")).keys() == child.state_dict().keys()
    # Who knows no gaps takes them for layers that do nothing.
    plain = read_as_it_stands(tmp_path / "child")
    assert len(plain.model.layers) == numbers[-1] + 1
    assert torch.equal(logits(plain), logits(child))
    assert plain.config.parent_layers[numbers[-1]] == numbers[-1] + 1
    save_model(again, tmp_path / "whole", tokenizer=None, by_block=paged)
    save_model(child, tmp_path / "expected", tokenizer=None, by_block=paged)
    assert digest_of_files(tmp_path / "whole") == digest_of_files(tmp_path / "expected")


@pytest.mark.parametrize("behind", [[1], 7, {}, [1] * 9])
def test_depths_that_do_not_fit_the_layers_are_an_error(behind: Any, tmp_path: Path) -> None:
    child = child_of("llama", [(4, 80), (1, 17)])
    save_model(child, tmp_path / "child", tokenizer=None, by_block=True, numbers=[1, 3])
    edit_config(tmp_path / "child", parent_layers=behind)
    with pytest.raises(CheckpointError, match="parent_layers"):
        load_model(tmp_path / "child")


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("layer", ["x", "9" * 5000])
def test_what_old_checkpoints_carry_is_not_read_whatever_its_layer(layer: str, paged: bool, tmp_path: Path) -> None:
    child = child_of("llama")
    save_model(child, tmp_path / "child", tokenizer=None)
    weights = load_file(tmp_path / "child" / "model.safetensors")
    weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "child" / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load_model(tmp_path / "child", paged=paged)), logits(child))


def test_equal_layers_with_gaps_are_a_dense_model_again(tmp_path: Path) -> None:
    dense = dense_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense")
    numbers = [2 * number for number in range(model.config.num_hidden_layers)]
    save_model(model, tmp_path / "gaps", tokenizer=None, by_block=True, numbers=numbers)
    assert read_config(tmp_path / "gaps")["model_type"] == "nemotron-nas"
    save_model(load_model(tmp_path / "gaps"), tmp_path / "again", tokenizer=None)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(dense))


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_survives_reading_and_writing(kind: str, tmp_path: Path) -> None:
    dense = rope_model(kind)
    dense.save_pretrained(tmp_path / "dense")
    save_model(load_model(tmp_path / "dense"), tmp_path / "again", tokenizer=None)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(dense))


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_rope_keys_of_older_files_are_read(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    kind = scaling.get("rope_type", scaling.get("type")) if scaling else "default"
    rope = {**(scaling or {}), "rope_type": kind, "rope_theta": 500.0}
    dense = dense_model("llama", rope_parameters=rope)
    dense.save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    assert torch.equal(logits(load_model(tmp_path)), logits(dense))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_changed_child_is_a_nemotron_nas_folder_with_the_same_logits(family: str, tmp_path: Path) -> None:
    child = child_of(family)
    save_model(child, tmp_path / "child", tokenizer=None)
    config = read_config(tmp_path / "child")
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert config["block_configs"][1]["ffn"] == {"no_op": False, "intermediate_size": 96}
    assert (config["qkv_bias"], config["attention_bias"]) == (family == "qwen2", False)
    again = load_model(tmp_path / "child")
    assert torch.equal(logits(again), logits(child))
    assert again.config.to_dict()["source_family"] == family
    assert torch.equal(logits(read_as_it_stands(tmp_path / "child")), logits(child))


def test_a_child_of_its_parents_kind_still_tells_which_layers_it_comes_from(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    child = load_model(tmp_path / "dense")
    child.config.parent_layers = [2, 5]
    save_model(child, tmp_path / "child", tokenizer=None)
    assert read_config(tmp_path / "child")["model_type"] == "llama"
    assert load_model(tmp_path / "child").config.parent_layers == [2, 5]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "child")), logits(child))


def test_a_folder_with_nvidias_names_is_the_same_model(tmp_path: Path) -> None:
    values = dense_model("llama", intermediate_size=256).config.to_dict()
    model = TesseraForCausalLM(model_config(values))
    with torch.no_grad():
        model.model.layers[1].mlp = model.model.layers[1].post_attention_layernorm = None
    model.config.block_configs[1].ffn.no_op = True
    save_model(model, tmp_path / "ours", tokenizer=None)
    blocks = read_config(tmp_path / "ours")["block_configs"]
    for block in blocks:
        width = block["ffn"].pop("intermediate_size")
        # 256 channels: 2/3 of 8 times the hidden size 48, which is the very multiple.
        block["ffn"]["ffn_mult"] = None if block["ffn"]["no_op"] else width * 3 / 2 / 48
    edit_config(tmp_path / "ours", block_configs=blocks, auto_map={"AutoConfig": "configuration_decilm.DeciLMConfig"})
    assert torch.equal(logits(load_model(tmp_path / "ours")), logits(model))


def test_sharded_folders_are_read_and_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = variety("llama")
    dense.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", "60KB")
    save_model(load_model(tmp_path / "dense"), tmp_path / "again", tokenizer=None)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(dense))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_as_stored_or_as_asked(tied: bool, tmp_path: Path) -> None:
    dense = dense_model("llama", tie_word_embeddings=tied).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    stored, asked = load_model(tmp_path / "dense", dtype=None), load_model(tmp_path / "dense")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in asked.parameters()} == {torch.float32}
    assert (stored.lm_head.weight is stored.model.embed_tokens.weight) == tied
    save_model(stored, tmp_path / "again", tokenizer=None)
    assert read_config(tmp_path / "again")["dtype"] == "bfloat16"
    for name, value in load_file(tmp_path / "again/model.safetensors").items():
        assert torch.equal(value, dense.get_parameter(name))


def test_training_a_loaded_model_leaves_its_folder_as_it_was(tmp_path: Path) -> None:
    variety("llama").save_pretrained(tmp_path)
    before = digest_of_files(tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert digest_of_files(tmp_path) == before


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(child_of("qwen2"), tmp_path / name, tokenizer=None)
    assert digest_of_files(tmp_path / "a") == digest_of_files(tmp_path / "b")


def test_tokenizer_files_go_along_and_foreign_weights_do_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    twin(variety("llama")).config.save_pretrained(source)
    for name in ("tokenizer.json", "chat_template.jinja", "pytorch_model.bin", "model.safetensors"):
        (source / name).write_text(name)
    save_model(twin(variety("llama")), tmp_path / "out", tokenizer=source)
    assert (tmp_path / "out/tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "out/chat_template.jinja").read_text() == "chat_template.jinja"
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    check_checkpoint(tmp_path / "out")


def test_a_failure_while_saving_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "save_torch_state_dict", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(twin(variety("llama")), tmp_path / "out", tokenizer=None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        save_model(twin(variety("llama")), tmp_path, tokenizer=None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    variety("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(12)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 missing \['model.layers.1.mlp.up_proj.weight'\], 1 unexpected"
    ) as caught:
        load_model(tmp_path)
    assert "q_norm" in caught.value.message


def test_a_qwen2_whose_heads_do_not_add_up_to_its_width_is_written_so_that_vllm_can_run_it(tmp_path: Path) -> None:
    # vLLM takes a Qwen2's head size from its width, whatever head_dim says.
    dense = dense_model("qwen2", head_dim=16)
    dense.save_pretrained(tmp_path / "dense")
    save_model(load_model(tmp_path / "dense"), tmp_path / "again", tokenizer=None)
    assert read_config(tmp_path / "again")["model_type"] == "nemotron-nas"
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(dense))
