"""Precision follows the checkpoint: what a stage trains is written, computed and served as the incoming model is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig

from components.core.model.checkpoint import model_config, read_weights, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.inspection import read_config, stored_dtype
from components.core.runtime.context import StageContext
from components.core.serving.load_profile import LoadProfile
from components.core.serving.server import Server
from components.core.serving.serving_config import ServingConfig
from components.core.text.toggle import system_message
from components.distill.config import DistillConfig
from components.distill.stage import run as distil
from components.eval.serving import group_by_architecture
from components.pretrain.config import PretrainConfig
from components.pretrain.stage import run as pretrain
from components.sft.config import SftConfig
from components.sft.stage import run as tune
from tests.components.conftest import Recorder, write_rows

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
ONE_STEP: dict[str, Any] = {"num_steps": 1, "global_batch_size": 4, "micro_batch_size": 4, "seq_len": 64, "seed": 1}
STORED = ("float32", "bfloat16", "float16")


@pytest.fixture
def model(tokenizer_folder: Path) -> TesseraForCausalLM:
    torch.manual_seed(0)
    vocabulary = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).get_vocab_size()
    config = LlamaConfig(**SIZES, vocab_size=vocabulary, eos_token_id=0, bos_token_id=None, max_position_embeddings=64)
    return TesseraForCausalLM(model_config(config.to_dict()))


def dtypes(folder: Path) -> set[str]:
    return {str(tensor.dtype).removeprefix("torch.") for _, tensor in read_weights(folder)}


@pytest.mark.parametrize("by_block", [False, True])
def test_a_model_is_written_in_the_asked_precision_and_half_as_large(
    model: TesseraForCausalLM, tmp_path: Path, by_block: bool
) -> None:
    for name in ("float32", "bfloat16"):
        folder = tmp_path / name
        save_model(model, folder, tokenizer=None, dtype=getattr(torch, name), by_block=by_block)
        assert dtypes(folder) == {name}
        assert read_config(folder)["dtype"] == name
    large, small = (
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("float32", "bfloat16")
    )
    assert small == pytest.approx(large / 2, rel=0.05)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", STORED)
def test_the_precision_of_a_folder_is_that_of_its_config_else_of_its_tensors(
    model: TesseraForCausalLM, tmp_path: Path, name: str
) -> None:
    save_model(model, tmp_path / "model", tokenizer=None, dtype=getattr(torch, name))
    config = tmp_path / "model" / "config.json"
    text = config.read_text()
    assert stored_dtype(tmp_path / "model") == name
    config.write_text(text.replace('"dtype"', '"torch_dtype"'))
    assert stored_dtype(tmp_path / "model") == name
    config.write_text(text.replace('"dtype"', '"another_key"'))
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()  # one tensor of many, and the first in the file
    save_file(tensors, weights, {"format": "pt"})
    assert stored_dtype(tmp_path / "model") == name


@pytest.mark.parametrize("name", STORED)
def test_trained_models_have_the_precision_of_the_incoming_one(
    model: TesseraForCausalLM,
    tmp_path: Path,
    tokenizer_folder: Path,
    sums: Path,
    out: Path,
    recorded_context: StageContext,
    name: str,
) -> None:
    folder = tmp_path / "model"
    save_model(model, folder, tokenizer=tokenizer_folder, dtype=getattr(torch, name))
    (tmp_path / "chats").mkdir()
    turns = [{"role": "user", "content": "3+4="}, {"role": "assistant", "content": "7"}]
    write_rows(tmp_path / "chats" / "train.jsonl", [{"messages": [system_message("off"), *turns], "reasoning": "off"}])
    common: dict[str, Any] = {"context": recorded_context, "out": out}
    pretrain(PretrainConfig(**ONE_STEP), **common, model=folder, tokenizer=tokenizer_folder, corpus=sums)
    distil(DistillConfig(**ONE_STEP), **common, teacher=folder, student=folder, corpus=sums)
    tune(SftConfig(**ONE_STEP), **common, model=folder, tokenizer=tokenizer_folder, chats=tmp_path / "chats")

    before = dict(read_weights(folder))
    for trained in ("trained", "distilled", "tuned"):
        assert dtypes(out / trained) == {name}
        assert stored_dtype(out / trained) == name
    assert any(not torch.equal(before[key], value) for key, value in read_weights(out / "trained"))


@pytest.mark.parametrize(
    ("name", "computed"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]
)
def test_products_are_computed_as_the_incoming_model_is_stored_unless_the_recipe_says_otherwise(
    model: TesseraForCausalLM,
    tmp_path: Path,
    tokenizer_folder: Path,
    sums: Path,
    recorded_context: StageContext,
    recorder: Recorder,
    name: str,
    computed: str,
) -> None:
    folder = tmp_path / "model"
    save_model(model, folder, tokenizer=tokenizer_folder, dtype=getattr(torch, name))
    losses = {}
    for dtype in (None, "float32", "bfloat16"):
        out = tmp_path / str(dtype)
        out.mkdir()
        config = PretrainConfig(**ONE_STEP, dtype=dtype)
        losses[dtype] = pretrain(
            config, context=recorded_context, out=out, model=folder, tokenizer=tokenizer_folder, corpus=sums
        )["loss"]

    assert losses["float32"] != losses["bfloat16"]
    assert losses[None] == losses[computed]


def test_a_server_serves_the_stored_precision_unless_told_otherwise(model: TesseraForCausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model", tokenizer=None, dtype=torch.bfloat16)

    def served(**settings: Any) -> str:
        serving = ServingConfig(**settings)
        arguments = Server(tmp_path / "model", name="m", log=tmp_path / "log", serving=serving)._arguments()
        return arguments[arguments.index("--dtype") + 1]

    assert served() == "bfloat16"
    assert served(dtype="float32") == "float32"


def test_a_server_takes_devices_and_address_from_its_settings(
    model: TesseraForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tmp_path / "model", tokenizer=None)

    def arguments(**settings: Any) -> list[str]:
        serving = ServingConfig(**settings)
        return Server(tmp_path / "model", name="m", log=tmp_path / "log", serving=serving)._arguments()

    own = arguments(tensor_parallel=2, max_model_len=16, host="0.0.0.0", dtype="float8")
    for option, value in {
        "--tensor-parallel-size": "2",
        "--max-model-len": "16",
        "--host": "0.0.0.0",
        "--dtype": "bfloat16",
        "--quantization": "fp8",
        "--kv-cache-dtype": "fp8",
    }.items():
        assert own[own.index(option) + 1] == value
    monkeypatch.setattr("components.core.serving.server.vllm_uses_gpu", lambda: True)
    own = arguments(gpu_memory_fraction=0.7)
    assert own[own.index("--gpu-memory-utilization") + 1] == "0.7"
    assert "--gpu-memory-utilization" not in arguments()


def test_a_load_takes_the_precision_of_the_checkpoint_unless_the_recipe_says_otherwise() -> None:
    assert LoadProfile().served_as("bfloat16").precision == "bfloat16"
    assert LoadProfile(dtype="float8").served_as("bfloat16").precision == "float8"


def test_models_of_two_precisions_have_a_server_each(model: TesseraForCausalLM, tmp_path: Path) -> None:
    for name in STORED[:2]:
        save_model(model, tmp_path / name, tokenizer=None, dtype=getattr(torch, name))

    groups = group_by_architecture({"parent": tmp_path / "float32", "child": tmp_path / "bfloat16"})
    assert groups == [["parent"], ["child"]]
