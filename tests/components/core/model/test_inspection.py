import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from components.core.base.errors import CheckpointError
from components.core.model.architecture import Architecture
from components.core.model.inspection import check_checkpoint, inspect_checkpoint, read_config
from components.core.model.weight_index import INDEX
from tests.components.core.dense_models import dense_model
from tests.components.core.nvidia_configs import super_49b, ultra_253b


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen2 checkpoint that transformers wrote, with a tokenizer."""
    dense_model("qwen2").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | changes))


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(folder)
    return caught.value


def test_a_released_model_is_told_from_its_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(super_49b()))
    facts = inspect_checkpoint(tmp_path)
    assert facts == inspect_checkpoint(tmp_path / "config.json")
    widths, heads = facts.pop("intermediate_sizes"), facts.pop("num_key_value_heads")
    assert (widths[0], widths[11], widths[62]) == (14336, 17920, 2816)
    assert (heads[5], heads[6], heads.count(None)) == (8, None, 31)
    assert facts == {
        "architecture": "DeciLMForCausalLM",
        "parameters": 49_867_145_216,
        "parameters_by_part": {
            "embedding": 1_050_673_152,
            "attention": 7_398_752_256,
            "ffn": 40_365_981_696,
            "norm": 1_064_960,
            "lm_head": 1_050_673_152,
        },
        "layers": 80,
        "attention_layers": 49,
        "ffn_layers": 80,
        "kv_bytes_per_token": 200_704,
        "weight_bytes": {
            "float32": 199_468_580_864,
            "bfloat16": 99_734_290_432,
            "float16": 99_734_290_432,
            "float8": 49_867_145_216,
        },
    }


def test_linear_parts_are_counted_as_one_square_matrix(tmp_path: Path) -> None:
    config, size = super_49b(), 8192
    linear = {"no_op": False, "replace_with_linear": True}
    config["block_configs"][0]["attention"] |= linear | {"n_heads_in_group": None}
    config["block_configs"][6]["ffn"] |= linear | {"ffn_mult": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = inspect_checkpoint(tmp_path)
    attention, ffn = 2 * size * (64 + 8) * 128, 3 * size * 14336
    assert facts["parameters"] == 49_867_145_216 - (attention - size**2) - (ffn - size**2)
    assert facts["kv_bytes_per_token"] == 200_704 - 2 * 2 * 8 * 128
    assert (facts["attention_layers"], facts["ffn_layers"]) == (48, 80)
    assert (facts["num_key_value_heads"][0], facts["intermediate_sizes"][6]) == ("linear", "linear")


def test_layers_without_ffn_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ultra_253b()))
    facts = inspect_checkpoint(tmp_path)
    assert (facts["parameters"], facts["kv_bytes_per_token"]) == (253_401_268_224, 262_144)
    assert (facts["layers"], facts["attention_layers"], facts["ffn_layers"]) == (162, 64, 81)
    assert (facts["intermediate_sizes"][9], facts["intermediate_sizes"][125]) == (None, 399_360)


def test_a_dense_folder_is_told_and_accepted(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    facts = inspect_checkpoint(folder)
    assert facts["architecture"] == "Qwen2ForCausalLM"
    assert facts["parameters"] == sum(value.numel() for value in weights.values())
    assert facts["num_key_value_heads"] == [2, 2, 2]
    assert check_checkpoint(folder) == Architecture.from_config(read_config(folder))


def test_a_sharded_folder_is_accepted_and_a_missing_shard_named(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    check_checkpoint(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path).message


def test_an_index_cannot_lead_out_of_its_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.with_name("model.safetensors"))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    assert "names 1 files that are not there" in refusal(folder).message


FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3": ({"model_type": "qwen3"}, "no norms on queries and keys"),
    "qwen3 moe": ({"model_type": "qwen3_moe", "num_experts": 8}, r"mixtures of experts \(num_experts=8\)"),
    "mixtral": ({"model_type": "mixtral", "num_local_experts": 8}, "mixtures of experts"),
    "gpt2": ({"model_type": "gpt2"}, "'gpt2' is not supported: its blocks are unknown to the decoder"),
    "none": ({"model_type": None}, "'None' is not supported"),
    "own code": ({"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, "modeling_own.Own.* is never run"),
    "qwen2 window": (
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        "sliding_window=32, max_position_embeddings=64",
    ),
    "mistral window": ({"model_type": "mistral", "sliding_window": 32}, "sliding-window attention is not supported"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised weights"),
    "rope": ({"rope_parameters": {"rope_type": "mrope"}}, "rope_type 'mrope'"),
    "partial rope": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "=0.5 is not supported",
    ),
}


@pytest.mark.parametrize(("changes", "message"), FAMILIES.values(), ids=FAMILIES)
def test_what_the_decoder_cannot_stand_for_is_refused_with_the_reason(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 16},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
    ],
    ids=["switched off", "above the last layer", "as long as any sequence"],
)
def test_a_sliding_window_that_changes_nothing_is_no_reason(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    check_checkpoint(folder)


def test_a_mistral_that_names_no_window_has_the_familys(tmp_path: Path) -> None:
    dense_model("mistral", max_position_embeddings=8192, sliding_window=None).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    check_checkpoint(tmp_path)
    config = read_config(tmp_path)
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "sliding_window=4096, max_position_embeddings=8192" in refusal(tmp_path).message


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickled_weights_are_refused_unopened(folder: Path, suffix: str) -> None:
    (folder / "model.safetensors").rename(folder / f"weights{suffix}")
    error = refusal(folder)
    assert f"pickled (weights{suffix})" in error.message
    assert "safetensors" in str(error.hint)


def test_a_pickle_beside_safetensors_is_not_read(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n")
    check_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "there is no .*config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer.json"),
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(folder)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "nowhere").message


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_configuration_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "is not" in refusal(folder).message


@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_weights_are_refused_wherever_they_end(folder: Path, share: float) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    try:
        (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
        assert "model.safetensors is damaged" in refusal(folder).message
    finally:
        (folder / "model.safetensors").write_bytes(whole)


def test_weights_with_more_behind_them_are_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    assert "not fully covered" in refusal(folder).message


def tampered(folder: Path, change: Callable[[dict[str, Any]], object]) -> CheckpointError:
    """The refusal after a change of the header, with the header's length kept right."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return refusal(folder)


TAMPERED: dict[str, Callable[[dict[str, Any]], object]] = {
    "longer shape": lambda header: header["model.norm.weight"].update(shape=[480]),
    "negative sizes": lambda header: header["model.norm.weight"].update(shape=[-6, -8]),
    "other type": lambda header: header["model.norm.weight"].update(dtype="F64"),
    "overlap": lambda header: header["model.norm.weight"].update(data_offsets=[0, 192]),
    "beyond the end": lambda header: header["model.norm.weight"].update(data_offsets=[1 << 40, (1 << 40) + 192]),
    "no offsets": lambda header: header["model.norm.weight"].pop("data_offsets"),
    "text for a number": lambda header: header["model.norm.weight"].update(shape=["wide"]),
    "tensor dropped": lambda header: header.pop("model.norm.weight"),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_header_is_refused(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    assert "model.safetensors is damaged" in tampered(folder, change).message


def test_quantised_weights_are_refused(folder: Path) -> None:
    error = tampered(folder, lambda header: header["model.norm.weight"].update(dtype="I32", shape=[48]))
    assert error.message == "model.safetensors: model.norm.weight is stored as I32"


def test_a_weight_of_the_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    edit_config(folder, intermediate_size=81)
    error = refusal(folder)
    assert "has shape [80, 48], and config.json asks for [81, 48]" in error.message


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.3.mlp.up_proj.weight"])
def test_weights_that_the_architecture_has_no_place_for_are_refused(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: torch.ones(2)}, folder / "model.safetensors")
    assert f"0 missing [], 1 unexpected ['{name}']" in refusal(folder).message


def test_frequencies_and_the_copy_of_a_tied_head_in_old_files_are_passed_over(tmp_path: Path) -> None:
    dense_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(weights, tmp_path / "model.safetensors")
    check_checkpoint(tmp_path)
