"""Reads and writes models: Hugging Face folders of safetensors, dense or heterogeneous."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from components.core.base.errors import CheckpointError
from components.core.model.architecture import Architecture
from components.core.model.decoder import TesseraConfig, TesseraForCausalLM
from components.core.model.families import HETEROGENEOUS_FAMILY, refuse_unsupported
from components.core.model.inspection import check_weights, read_architecture, read_config
from components.core.model.layer_files import LayerFiles, page_layers, state_in_pieces, write_blocks
from components.core.model.layer_numbering import LAYERS, name_in_model, with_gaps
from components.core.model.stored_weights import FetchWeight, write_weights
from components.core.model.weight_index import INDEX, PICKLED_SUFFIXES, weight_files, weight_names

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
HETEROGENEOUS_CLASS = "DeciLMForCausalLM"
COPIED_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "parent_layers",
)
"""Keys that are copied unchanged; those of the blocks are derived from the architecture."""
DERIVED_KEYS = ("num_hidden_layers", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias")
"""Further keys of every configuration, derived from the architecture."""
HETEROGENEOUS_KEYS = ("block_configs", "qkv_bias", "source_family")
"""Keys that a dense configuration does not have."""
DEFAULT_RMS_NORM_EPS = 1e-6
"""Default of all three dense families."""
MAX_SHARD_SIZE = "5GB"
NOT_TOKENIZER = ("config.json", "generation_config.json", INDEX)


def model_config(values: dict[str, Any]) -> TesseraConfig:
    """The decoder's configuration for a supported `config.json`; its `source_family` is the family of the file.

    Raises:
        CheckpointError: the decoder cannot represent this model.
    """
    refuse_unsupported(values)
    architecture = Architecture.from_config(values)
    family = (
        values.get("source_family", "llama") if architecture.family == HETEROGENEOUS_FAMILY else architecture.family
    )
    copied = {key: values[key] for key in COPIED_KEYS if key in values}
    depths = copied.get("parent_layers")
    if architecture.numbers is not None and depths is not None:
        if not isinstance(depths, list) or len(depths) != values["num_hidden_layers"]:
            raise CheckpointError(
                "config.json makes no sense: parent_layers has to be a list with one number for each layer"
            )
        copied["parent_layers"] = [depths[number] for number in architecture.numbers]
    return TesseraConfig(
        **copied,
        rms_norm_eps=values.get("rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        num_hidden_layers=len(architecture.blocks),
        block_configs=architecture.block_configs(),
        head_dim=architecture.head_dim,
        attention_bias=architecture.o_bias,
        qkv_bias=architecture.qkv_bias,
        mlp_bias=architecture.mlp_bias,
        source_family=family,
        architectures=[HETEROGENEOUS_CLASS],
    )


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    computes_in: torch.dtype | None = None,
    device: torch.device | None = None,
    paged: bool = False,
) -> TesseraForCausalLM:
    """Read a model folder.

    Args:
        folder: dense Llama, Mistral or Qwen2, or nemotron-nas.
        dtype: dtype of the weights in memory; None: as stored.
        computes_in: dtype of activations and arithmetic; None: that of the weights.
        device: where the weights are; None: on the CPU. A paged model reads each layer to it.
        paged: keep one decoder layer in memory at a time, read from the folder on use; not for training.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: an unsupported family, or weights that are pickled, damaged, missing or misshapen.
    """
    model, numbers = model_on_meta(folder)
    wanted = {name for name in model.state_dict() if not (paged and name.startswith(LAYERS))}
    state = {name: tensor.to(device, dtype or tensor.dtype) for name, tensor in read_weights(folder) if name in wanted}
    assign_weights(model, state, strict=not paged)
    model.model.embed_tokens.computes_in = computes_in
    model.requires_grad_(not paged)
    model.train(False)
    if paged:
        page_layers(model.model.layers, LayerFiles(folder, dtype, numbers, device).read)
    return model


def model_on_meta(folder: Path) -> tuple[TesseraForCausalLM, Sequence[int]]:
    """A model of a folder's shape on the meta device, and the number of each layer in the files, which are checked.

    Raises:
        CheckpointError: an unsupported family, or weights that are pickled, damaged, missing or misshapen.
    """
    values = read_config(folder)
    config = model_config(values)
    architecture = Architecture.from_config(values)
    check_weights(folder, architecture)
    with torch.device("meta"):
        return TesseraForCausalLM(config), architecture.layer_numbers


def assign_weights(model: TesseraForCausalLM, state: dict[str, Tensor], *, strict: bool = True) -> None:
    """Assign tensors to a model on the meta device, without a copy; a tied head may be missing.

    The model is then on the device of its embedding.

    Args:
        model: a model on the meta device.
        state: tensors by name.
        strict: raise an error if one is missing.
    """
    if model.config.tie_word_embeddings:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, assign=True, strict=strict)
    model.tie_weights()
    compute_rotary(model, model.model.embed_tokens.weight.device)


def compute_rotary(model: TesseraForCausalLM, device: torch.device) -> None:
    """Compute the frequencies of RoPE, which are not stored; those on the meta device have no values."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model folder, file by file, by its name in memory.

    Raises:
        CheckpointError: no safetensors, or no readable configuration.
    """
    numbers = read_architecture(folder).layer_numbers
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as reader:
            for name in weight_names(reader):
                yield name_in_model(name, numbers), reader.get_tensor(name)


def save_model(
    model: TesseraForCausalLM,
    folder: Path,
    *,
    tokenizer: Path | None,
    dtype: torch.dtype | None = None,
    by_block: bool = False,
    numbers: Sequence[int] | None = None,
    fetch: FetchWeight | None = None,
) -> None:
    """Write a model folder, complete or not at all.

    A model whose layers are all alike becomes a folder of its dense family, any other one of type nemotron-nas.

    Args:
        model: on any device.
        folder: created; where it exists, it has to be empty.
        tokenizer: a folder whose tokenizer files are copied into this one.
        dtype: dtype of the written weights; None: their own.
        by_block: write one file for each sub-block, for models that share sub-blocks; a paged model stays paged.
        numbers: with `by_block`, number of each layer in the files, ascending, see `layer_numbering`; None: 0, 1, 2, ….
        fetch: reads a weight of a model that is not whole in this process, in the dtype of the written weights, which
            has to be given; some rows are in memory at a time, or the weights of a layer with `by_block`.

    Raises:
        CheckpointError: the folder is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty", hint="give a folder that does not exist yet")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write(model, partial, tokenizer, dtype=dtype, by_block=by_block, numbers=numbers, fetch=fetch)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(
    model: TesseraForCausalLM,
    folder: Path,
    tokenizer: Path | None,
    *,
    dtype: torch.dtype | None,
    by_block: bool,
    numbers: Sequence[int] | None,
    fetch: FetchWeight | None,
) -> None:
    """Fill a folder: tokenizer, configurations, weights."""
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    consecutive = list(range(model.config.num_hidden_layers))
    numbers = consecutive if numbers is None else list(numbers)
    assert by_block or numbers == consecutive
    config = written_config(model) if numbers == consecutive else with_gaps(_heterogeneous_config(model), numbers)
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(folder / "generation_config.json", {name: getattr(model.config, name, None) for name in ids})
    if by_block:
        pieces = state_in_pieces(model, model.model.layers, numbers)
        write_blocks(pieces if fetch is None else _fetched(pieces, fetch), folder, dtype)
        return
    if fetch is not None:
        shapes = {
            name: torch.empty(weight.shape, dtype=dtype, device="meta") for name, weight in model.named_parameters()
        }
        write_weights(folder, shapes, fetch, MAX_SHARD_SIZE)
        return
    state = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_torch_state_dict(state, folder, max_shard_size=MAX_SHARD_SIZE)


def _fetched(pieces: Iterator[Mapping[str, Tensor]], fetch: FetchWeight) -> Iterator[dict[str, Tensor]]:
    """Pieces of a model's state with the values of its weights."""
    for piece in pieces:
        yield {name: torch.cat(list(fetch(name))) for name in piece}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def written_config(model: TesseraForCausalLM) -> dict[str, Any]:
    """The `config.json` to write: the dense family's own where the layers are all alike, nemotron-nas otherwise."""
    config = model.config
    values = _heterogeneous_config(model)
    block, family = Architecture.from_config(values).uniform, values.get("source_family", "llama")
    if block is None or not _expressible(config, family):
        return values
    dense = {name: value for name, value in values.items() if name not in HETEROGENEOUS_KEYS}
    dense |= {"num_key_value_heads": block.num_key_value_heads, "intermediate_size": block.intermediate_size}
    dense |= {"model_type": family, "architectures": [CLASSES[family]]}
    if family == "mistral":
        dense["sliding_window"] = None  # absent would mean the family's default window
    if family != "llama":
        del dense["attention_bias"], dense["mlp_bias"]
    return dense


def _heterogeneous_config(model: TesseraForCausalLM) -> dict[str, Any]:
    """The `config.json` of any model."""
    plain = model.config.to_dict()
    values = {name: plain[name] for name in (*COPIED_KEYS, *HETEROGENEOUS_KEYS, *DERIVED_KEYS) if name in plain}
    values["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    return values | {"model_type": HETEROGENEOUS_FAMILY, "architectures": [HETEROGENEOUS_CLASS]}


def _expressible(config: PretrainedConfig, family: str) -> bool:
    """Whether the family's configuration can express which projections have biases, and the size of a head."""
    biases = (config.qkv_bias, config.attention_bias, config.mlp_bias)
    if family == "qwen2":
        return biases == (True, False, False) and config.head_dim * config.num_attention_heads == config.hidden_size
    if family == "mistral":
        return biases == (False, False, False)
    return family == "llama" and bool(config.qkv_bias == config.attention_bias)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of a folder: everything that is neither weights nor configuration of a model."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in NOT_TOKENIZER and file.suffix not in (".safetensors", *PICKLED_SUFFIXES):
            shutil.copy(file, target / file.name)
