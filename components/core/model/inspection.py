"""Describes a checkpoint and checks it, from its configuration and file headers alone. Imports no torch."""

import json
import math
import struct
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from components.core.base.errors import CheckpointError
from components.core.model.architecture import WEIGHT_BYTES, Architecture
from components.core.model.families import refuse_unsupported

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
SINGLE_FILE, ADAPTER_FILE = "model.safetensors", "adapter_model.safetensors"
MAX_JSON_BYTES = 64 << 20
"""Maximum size of a JSON file that is parsed; configurations and indexes are far smaller."""
MAX_HEADER_BYTES = 16 << 20
"""Maximum header of a safetensors file: 100,000 tensors. Parsing takes several times as much memory."""
WEIGHT_DTYPES = ("F64", "F32", "BF16", "F16")
"""Types of unquantised weights in safetensors files."""
StoredDtype = Literal["float32", "bfloat16", "float16"]
"""Precision of a checkpoint."""
STORED_DTYPES: dict[str, StoredDtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The same by its name in safetensors files."""
RECOMPUTED = ".rotary_emb.inv_freq"
"""End of the names of tensors that old checkpoints contain; they are computed instead of read."""


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Facts about a checkpoint folder or a `config.json`; the weights need not be there.

    Raises:
        CheckpointError: there is no readable configuration, or its family is not supported.
    """
    config = read_config(path)
    shape = Architecture.from_config(config)
    names = config.get("architectures")
    heads = [block.num_key_value_heads for block in shape.blocks]
    widths = [block.intermediate_size for block in shape.blocks]
    return {
        "architecture": str(names[0]) if isinstance(names, list) and names else shape.family,
        "parameters": shape.parameters,
        "parameters_by_part": shape.parameters_by_part(),
        "layers": len(shape.blocks),
        "attention_layers": sum(block.attends for block in shape.blocks),
        "ffn_layers": sum(value is not None for value in widths),
        "intermediate_sizes": widths,
        "num_key_value_heads": heads,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "weight_bytes": {dtype: size * shape.parameters for dtype, size in WEIGHT_BYTES.items()},
    }


def stored_dtype(folder: Path) -> StoredDtype:
    """Precision of a checkpoint: what `config.json` says, else that of its largest tensor.

    Float64 counts as float32, because nothing is served or trained in more.

    Raises:
        CheckpointError: the configuration or the weights cannot be read.
    """
    config = read_config(folder)
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    for dtype in STORED_DTYPES.values():
        if named == dtype:
            return dtype
    file = weight_files(folder)[0]
    shapes = read_shapes(file)
    largest = max(shapes, key=lambda name: math.prod(shapes[name]))
    with safe_open(file, "numpy") as opened:
        return STORED_DTYPES.get(str(opened.get_slice(largest).get_dtype()), "float32")


def check_checkpoint(folder: Path) -> Architecture:
    """Check, before any work starts, that a model folder can be read safely.

    Raises:
        CheckpointError: pickled weights, remote code, an unsupported family, a missing or damaged file, or weights that
            do not fit the configuration.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", hint="give a Hugging Face model folder")
    config = read_config(folder)
    refuse_unsupported(config)
    shape = Architecture.from_config(config)
    check_weights(folder, shape)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json",
            hint="save its tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return shape


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a checkpoint folder, or of the `config.json` itself.

    Raises:
        CheckpointError: it is not there, or not a JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"there is no {file}", hint="give a Hugging Face model folder or its config.json")
    return _read_object(file)


def read_architecture(path: Path) -> Architecture:
    """The shape of a checkpoint folder, or of a `config.json`.

    Raises:
        CheckpointError: there is no readable configuration, or its family is not supported.
    """
    return Architecture.from_config(read_config(path))


def check_weights(folder: Path, shape: Architecture) -> list[Path]:
    """Check that every weight is present and complete, and has the shape that the configuration asks for.

    Returns:
        The safetensors files.

    Raises:
        CheckpointError: pickled, missing, damaged, unexpected or misshapen weights.
    """
    files = weight_files(folder)
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= {name: size for name, size in read_shapes(file).items() if not name.endswith(RECOMPUTED)}
    expected = shape.weight_shapes()
    if shape.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"the weights in {folder.name} do not fit its config.json: "
            f"{len(missing)} missing {missing[:2]}, {len(extra)} unexpected {extra[:2]}"
        )
    for name, size in expected.items():
        if found[name] != size:
            raise CheckpointError(f"{name} has shape {list(found[name])}, and config.json asks for {list(size)}")
    return files


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a safetensors file, from its header.

    Raises:
        CheckpointError: the header is damaged or does not match the size of the file, or the weights are quantised.
    """
    with file.open("rb") as stream:
        prefix = stream.read(8)
    if len(prefix) < 8 or struct.unpack("<Q", prefix)[0] > MAX_HEADER_BYTES:
        raise _damaged(file, f"it begins with no header of at most {MAX_HEADER_BYTES:,} bytes")
    try:
        with safe_open(file, "numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            dtypes = {name: str(tensor.get_dtype()) for name, tensor in slices.items()}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    except SafetensorError as error:
        raise _damaged(file, str(error)[:200]) from None
    for name, dtype in dtypes.items():
        if dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{file.name}: {name[:80]} is stored as {dtype}",
                hint=f"start from unquantised weights: {', '.join(WEIGHT_DTYPES)}",
            )
    return shapes


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file.name} is damaged: {reason}", hint="copy or download it again")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those of its index, or all if it has no index.

    Raises:
        CheckpointError: there are none, or some are missing.
    """
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("._"))
    if (folder / INDEX).is_file():
        indexed = _indexed_files(folder)
        single = folder / SINGLE_FILE
        if single.is_file() and single not in indexed:
            raise CheckpointError(
                f"{folder.name} has two models: {SINGLE_FILE}, and {len(indexed)} files that {INDEX} names, such as "
                f"{indexed[0].name}",
                hint=f"remove {SINGLE_FILE}, or {INDEX} and its files",
            )
        files = indexed
    if (folder / SINGLE_FILE) in files:
        files = [folder / SINGLE_FILE]
    if files and all(path.name == ADAPTER_FILE for path in files):
        raise CheckpointError(
            f"{folder.name} has an adapter alone ({ADAPTER_FILE}), not a model",
            hint="merge it first: PeftModel.merge_and_unload() and save_pretrained(folder)",
        )
    if not files:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
        if pickled:
            raise CheckpointError(
                f"the weights in {folder.name} are pickled ({pickled[0]}), and reading a pickle can run any code",
                hint="save them as safetensors: model.save_pretrained(folder)",
            )
        raise CheckpointError(
            f"{folder} has no weights", hint="copy its *.safetensors into the folder of its config.json"
        )
    return files


def _indexed_files(folder: Path) -> list[Path]:
    """The files that an index names; they must be in the folder itself."""
    names = _read_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{INDEX} has no weight_map", hint="copy or download it again")
    wanted = sorted({str(name) for name in names.values()})
    missing = [name for name in wanted if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{INDEX} names {len(missing)} files that are not there: {', '.join(missing[:3])}",
            hint="copy or download the rest",
        )
    return [folder / name for name in wanted]


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object."""
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} is larger than {MAX_JSON_BYTES:,} bytes", hint="copy or download it again")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return values
