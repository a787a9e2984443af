"""Configurations as older and other tools write them: read as transformers reads them, or refused with the reason."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from components.core.base.errors import CheckpointError
from components.core.model.checkpoint import load_model
from components.core.model.inspection import check_checkpoint, stored_dtype
from tests.components.core import tiny_models
from tests.components.core.dense_models import dense_model

IDS = torch.tensor([[5, 6, 7, 8] * 8])
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ABSENT = object()


def dense_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    model = dense_model(family, **sizes)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(kept))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)


READ: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rope_scaling with type": (
        "llama",
        {},
        {"rope_parameters": ABSENT, "rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "rope_scaling with rope_type": (
        "llama",
        {},
        {"rope_parameters": ABSENT, "rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ),
    "null head_dim": ("llama", {}, {"head_dim": None}),
    "no KV heads": ("llama", {"num_key_value_heads": 4}, {"num_key_value_heads": ABSENT}),
    "padding by a negative id": ("llama", {}, {"pad_token_id": -1}),
    "several end tokens": ("llama", {}, {"eos_token_id": [1, 2]}),
    "layer_types": ("qwen2", {}, {"layer_types": ["full_attention"] * 3, "use_sliding_window": False}),
}


@pytest.mark.parametrize(("family", "sizes", "changes"), READ.values(), ids=READ)
def test_a_configuration_is_read_as_transformers_reads_it(
    tmp_path: Path, family: str, sizes: dict[str, Any], changes: dict[str, Any]
) -> None:
    folder = dense_folder(tmp_path / "parent", family, **sizes)
    edit_config(folder, **changes)
    check_checkpoint(folder)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        torch.testing.assert_close(load_model(folder)(IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = dense_folder(tmp_path / "parent", "llama", dtype)
    assert load_model(folder, dtype=None).lm_head.weight.dtype == dtype
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(load_model(folder)(IDS).logits, expected)
    edit_weights(folder, lambda weights: {**weights, "mask": torch.ones(100, 100, dtype=torch.int64)})
    edit_config(folder, dtype=ABSENT)
    assert stored_dtype(folder) == str(dtype).removeprefix("torch.")  # not that of the largest tensor, the mask


def test_an_original_beside_a_model_is_not_read(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "parent", "llama")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"cos\nsystem\n")
    (folder / "original" / "params.json").write_text("{}")
    check_checkpoint(folder)


def to_float8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "model.layers.0.mlp.up_proj.weight"
    return {**weights, name: weights[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}


def to_gptq(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "model.layers.0.mlp.up_proj"
    rest = {key: value for key, value in weights.items() if key != f"{name}.weight"}
    return {**rest, f"{name}.qweight": torch.ones(6, 80, dtype=torch.int32)}


def to_classifier(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    rest = {key: value for key, value in weights.items() if key != "lm_head.weight"}
    return {**rest, "score.weight": torch.ones(2, 48)}


def to_wrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in weights.items()}


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "FP8": (to_float8, "up_proj.weight is stored as F8_E4M3"),
    "GPTQ": (to_gptq, "up_proj.qweight is stored as I32"),
    "classifier": (to_classifier, r"1 missing \['lm_head.weight'\], 1 unexpected \['score.weight'\]"),
    "module. before each name": (to_wrapped, r"unexpected \['module\."),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_weights_of_other_kinds_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    folder = dense_folder(tmp_path / "parent", "llama")
    edit_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(folder)


def test_a_slow_tokenizer_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "parent", "llama")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json\n  hint: save its tokenizer there"):
        check_checkpoint(folder)
