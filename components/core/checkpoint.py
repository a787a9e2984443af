"""Models in and out: Hugging Face folders of safetensors, dense or heterogeneous."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from components.core.architecture import DENSE_FAMILIES, Architecture
from components.core.errors import CheckpointError
from components.core.model import TesseraConfig, TesseraForCausalLM

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
INDEX = "model.safetensors.index.json"
NOT_TOKENIZER = ("config.json", "generation_config.json", INDEX)
PLUMBING = ("architectures", "model_type", "auto_map", "transformers_version", "_name_or_path", "dtype", "torch_dtype")


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json", hint="give a Hugging Face model folder")
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def model_config(values: dict[str, Any]) -> TesseraConfig:
    """Our configuration for a supported `config.json`, the family it came from kept as `source_family`."""
    architecture = Architecture.from_config(values)
    dropped = (*PLUMBING, "num_key_value_heads", "intermediate_size", "block_configs", "num_hidden_layers")
    dropped += ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "mlp_bias", "head_dim")
    dropped += ("attention_bias", "qkv_bias", "use_cache", "pretraining_tp", "attention_dropout", "source_family")
    kept = {key: value for key, value in values.items() if key not in dropped}
    family = values.get("source_family", "llama") if architecture.family == "nemotron-nas" else architecture.family
    return TesseraConfig(
        **kept,
        num_hidden_layers=len(architecture.blocks),
        block_configs=architecture.block_configs(),
        head_dim=architecture.head_dim,
        attention_bias=architecture.o_bias,
        qkv_bias=architecture.qkv_bias,
        mlp_bias=architecture.mlp_bias,
        source_family=family,
        architectures=["DeciLMForCausalLM"],
    )


def load_model(folder: Path, *, dtype: torch.dtype | None = torch.float32) -> TesseraForCausalLM:
    """Read a model folder.

    Args:
        folder: dense Llama, Mistral or Qwen2, or nemotron-nas.
        dtype: of the weights in memory; as stored where None.

    Raises:
        CheckpointError: an unsupported family, missing or unexpected weights, or no safetensors.
    """
    config = model_config(read_config(folder))
    with torch.device("meta"):
        model = TesseraForCausalLM(config)
    state = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in read_weights(folder)}
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    wanted = set(model.state_dict())
    extra = {name for name in state if name not in wanted and "rotary_emb" not in name}
    if extra or wanted - set(state):
        raise CheckpointError(
            f"{folder.name}: weights do not fit its config.json: missing {sorted(wanted - set(state))[:3]}, "
            f"unexpected {sorted(extra)[:3]}"
        )
    model.load_state_dict(state, assign=True, strict=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model folder, file by file."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    if not files:
        raise CheckpointError(f"{folder} has no safetensors", hint="convert the weights to safetensors first")
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a dictionary
                yield name, reader.get_tensor(name)


def save_model(model: TesseraForCausalLM, folder: Path, *, tokenizer: Path | None) -> None:
    """Write a model folder, complete or not at all.

    Args:
        model: its weights are written in their own dtype.
        folder: created, or filled where it is empty.
        tokenizer: a folder whose tokenizer files are copied beside the weights.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, partial)
    (partial / "config.json").write_text(json.dumps(written_config(model), indent=2, sort_keys=True) + "\n")
    generation = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
    if folder.is_dir():
        folder.rmdir()
    partial.rename(folder)


def written_config(model: TesseraForCausalLM) -> dict[str, Any]:
    """The `config.json` to write: the dense family's own where no block was changed, nemotron-nas otherwise."""
    values = {key: value for key, value in model.config.to_dict().items() if key not in PLUMBING}
    values["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    full = {**values, "model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"]}
    block, family = Architecture.from_config(full).uniform, values.get("source_family")
    if block is None or family not in DENSE_FAMILIES:
        return full
    dropped = ("block_configs", "source_family", "qkv_bias", "parent_layers")
    dense = {key: value for key, value in values.items() if key not in dropped}
    dense |= {"num_key_value_heads": block.num_key_value_heads, "intermediate_size": block.intermediate_size}
    if family == "mistral":
        dense["sliding_window"] = None
    return {**dense, "model_type": family, "architectures": [CLASSES[family]]}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of a folder: everything that is neither weights nor configuration of a model."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in NOT_TOKENIZER and file.suffix != ".safetensors":
            shutil.copy(file, target / file.name)


def resize_vocabulary(model: TesseraForCausalLM, size: int) -> None:
    """Give the embedding `size` rows; new rows start as the mean of the old ones."""
    for holder, name in ((model.model, "embed_tokens"), (model, "lm_head")):
        module = getattr(holder, name)
        old = module.weight.data
        rows = old.mean(dim=0, keepdim=True).expand(max(0, size - old.shape[0]), -1)
        module.weight = nn.Parameter(torch.cat([old[:size], rows]))
    model.lm_head.out_features = model.model.embed_tokens.num_embeddings = size
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.config.vocab_size = size
