"""What a checkpoint is, and whether it may be read, from its configuration and file headers alone. Light: no torch."""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from components.core.architecture import DENSE_FAMILIES, WEIGHT_BYTES, Architecture, BlockConfig
from components.core.errors import CheckpointError

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
MAX_HEADER_BYTES = 100 << 20
INDEX = "model.safetensors.index.json"

Shapes = dict[str, tuple[int, ...]]


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Tell of a checkpoint folder or a `config.json`, also where weights are absent.

    Raises:
        CheckpointError: there is no readable configuration, or its family is not supported.
    """
    config = read_config(path)
    shape = Architecture.from_config(config)
    heads = [block.num_key_value_heads for block in shape.blocks]
    widths = [block.intermediate_size for block in shape.blocks]
    return {
        "architecture": (config.get("architectures") or [config["model_type"]])[0],
        "parameters": shape.parameters,
        "parameters_by_part": shape.parameters_by_part(),
        "layers": len(shape.blocks),
        "attention_layers": sum(value is not None for value in heads),
        "ffn_layers": sum(value is not None for value in widths),
        "intermediate_sizes": widths,
        "num_key_value_heads": heads,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "weight_bytes": {dtype: size * shape.parameters for dtype, size in WEIGHT_BYTES.items()},
    }


def check_checkpoint(folder: Path) -> Architecture:
    """Refuse, before any work starts, a folder that cannot or must not be read.

    Raises:
        CheckpointError: pickled weights, code of its own, an unsupported family, a missing or damaged file, or weights that do not fit
            the configuration; says which, and the way out.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", hint="give a Hugging Face model folder")
    config = read_config(folder)
    _refuse_remote_code(config)
    _refuse_family(config)
    shape = Architecture.from_config(config)
    _check_weights(folder, shape)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json",
            hint="save its tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return shape


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a checkpoint folder, or of the `config.json` itself."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"there is no {file}", hint="give a Hugging Face model folder or its config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return config


def expected_shapes(shape: Architecture) -> Shapes:
    """Name and shape of every weight of an architecture, as Hugging Face names them."""
    D, V = shape.hidden_size, shape.vocab_size
    shapes: Shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not shape.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for number, block in enumerate(shape.blocks):
        shapes |= {f"model.layers.{number}.{name}": value for name, value in _block_shapes(shape, block)}
    return shapes


def _block_shapes(shape: Architecture, block: BlockConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    D = shape.hidden_size
    if block.num_key_value_heads is not None:
        width, narrow = shape.num_attention_heads * shape.head_dim, block.num_key_value_heads * shape.head_dim
        yield "input_layernorm.weight", (D,)
        for name, rows in (("q", width), ("k", narrow), ("v", narrow)):
            yield f"self_attn.{name}_proj.weight", (rows, D)
            if shape.qkv_bias:
                yield f"self_attn.{name}_proj.bias", (rows,)
        yield "self_attn.o_proj.weight", (D, width)
        if shape.o_bias:
            yield "self_attn.o_proj.bias", (D,)
    if block.intermediate_size is not None:
        width = block.intermediate_size
        yield "post_attention_layernorm.weight", (D,)
        for name, rows, columns in (("gate", width, D), ("up", width, D), ("down", D, width)):
            yield f"mlp.{name}_proj.weight", (rows, columns)
            if shape.mlp_bias:
                yield f"mlp.{name}_proj.bias", (rows,)


def _refuse_remote_code(config: Mapping[str, Any]) -> None:
    """Code from a model folder is never run; nemotron-nas folders are read without it."""
    if config.get("auto_map") and config.get("model_type") != "nemotron-nas":
        raise CheckpointError(
            f"the checkpoint would need its own code (auto_map: {', '.join(map(str, config['auto_map'].values()))}), "
            "and code from a model folder is never run",
            hint="convert it to a plain Llama, Mistral or Qwen2 folder",
        )


def _refuse_family(config: Mapping[str, Any]) -> None:
    """Families, and features of supported families, that the decoder does not have."""
    family = str(config.get("model_type"))
    reason = None
    if family.startswith("qwen3") and "moe" not in family:
        reason = "its query and key norms have no place in the decoder"
    elif "moe" in family or family in ("mixtral", "deepseek_v3", "gpt_oss") or config.get("num_local_experts"):
        reason = "mixtures of experts cannot be searched"
    elif family not in (*DENSE_FAMILIES, "nemotron-nas"):
        reason = "it is not Llama-shaped as far as we know"
    if reason:
        raise CheckpointError(
            f"model_type {family!r} is not supported: {reason}", hint="start from a Llama, Mistral or Qwen2 checkpoint"
        )
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", False) if family == "qwen2" else window is not None
    if used and window is not None and window < config.get("max_position_embeddings", math.inf):
        raise CheckpointError(
            f"sliding-window attention (sliding_window={window}) is not supported",
            hint="set sliding_window to null if the model works without it",
        )
    if config.get("quantization_config"):
        raise CheckpointError("quantised weights cannot be searched or trained", hint="start from the unquantised ones")


def _check_weights(folder: Path, shape: Architecture) -> None:
    """Every weight is there once, whole, and of the shape that the configuration asks for."""
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        wanted = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in wanted if not (folder / name).is_file())
        if missing:
            raise CheckpointError(f"{INDEX} names files that are not there: {', '.join(missing[:3])}")
        files = [folder / name for name in sorted(wanted)]
    if not files:
        if pickled:
            raise CheckpointError(
                f"the weights are pickled ({pickled[0]}), and unpickling can run any code",
                hint="save them as safetensors: model.save_pretrained(folder)",
            )
        raise CheckpointError(f"{folder} has no safetensors", hint="copy the weights beside its config.json")
    found: Shapes = {}
    for file in files:
        found |= safetensors_shapes(file)
    expected = expected_shapes(shape)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise CheckpointError(f"{len(missing)} weights are missing, {missing[0]} first")
    wrong = [name for name, size in expected.items() if found[name] != size]
    if wrong:
        name = wrong[0]
        raise CheckpointError(f"{name} has shape {found[name]}, where config.json asks for {expected[name]}")


def safetensors_shapes(file: Path) -> Shapes:
    """Names and shapes of a safetensors file, its header checked against its size.

    Raises:
        CheckpointError: the file is truncated or its header was tampered with.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(file, f"its header cannot be {length} bytes long in a file of {size} bytes")
        try:
            header = json.loads(stream.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise _damaged(file, "its header is not JSON") from None
    shapes: Shapes = {}
    end = 0
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"][0]):
        start, stop = entry["data_offsets"]
        nbytes = math.prod(entry["shape"]) * DTYPE_BYTES.get(entry["dtype"], 0)
        if start != end or stop - start != nbytes:
            raise _damaged(file, f"{name} does not lie where its shape and type put it")
        end = stop
        shapes[name] = tuple(entry["shape"])
    if 8 + length + end != size:
        raise _damaged(file, f"{8 + length + end} bytes are announced, {size} are there")
    return shapes


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file.name} is damaged: {reason}", hint="copy or download it again")
