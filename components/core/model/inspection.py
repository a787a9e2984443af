"""Describes a checkpoint and checks it, from its configuration and file headers alone. Imports no torch."""

import json
import math
from pathlib import Path
from typing import Any, Literal

from components.core.base.errors import CheckpointError
from components.core.model.architecture import WEIGHT_BYTES, Architecture
from components.core.model.families import refuse_unsupported
from components.core.model.weight_index import (
    BUFFER_DTYPES,
    INDEX,
    RECOMPUTED,
    WEIGHT_DTYPES,
    has_own_head,
    read_header,
    read_object,
    refuse_dangling,
    weight_files,
    weight_map,
    write_without_buffers,
)

StoredDtype = Literal["float32", "bfloat16", "float16"]
"""Precision of a checkpoint."""
STORED_DTYPES: dict[str, StoredDtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The same by its name in safetensors files."""
MODEL_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model"})
"""Files of a model or tokenizer folder that count; read-me files, other formats and hidden folders are left behind."""


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
    tensors = [tensor for tensor in read_header(weight_files(folder)[0]).values() if tensor[0] in WEIGHT_DTYPES]
    stored, _ = max(tensors, key=lambda tensor: math.prod(tensor[1]))
    return STORED_DTYPES.get(stored, "float32")


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
    refuse_dangling(folder / "tokenizer.json")
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json",
            hint="save its tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return shape


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a checkpoint folder, or of the `config.json` itself.

    A folder whose stored head differs from its embedding is untied, whatever its `config.json` says.

    Raises:
        CheckpointError: it is not there, or not a JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        refuse_dangling(file)
        if (path / "params.json").is_file():
            raise CheckpointError(
                f"{path.name} is in the original format of its makers (params.json), not in that of Hugging Face",
                hint="download the same model's config.json, tokenizer.json and model*.safetensors",
            )
        raise CheckpointError(f"there is no {file}", hint="give a Hugging Face model folder or its config.json")
    values = read_object(file)
    if values.get("tie_word_embeddings") is True and path.is_dir() and has_own_head(path):
        values["tie_word_embeddings"] = False
    return values


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
        CheckpointError: pickled, missing, damaged, unexpected, misshapen or quantised weights, or a weight twice.
    """
    files = weight_files(folder)
    found: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    buffers: list[str] = []
    expected = shape.weight_shapes()
    for file in files:
        for name, (dtype, size) in read_header(file).items():
            if name.endswith(RECOMPUTED):
                continue
            if dtype not in WEIGHT_DTYPES and (name in expected or dtype not in BUFFER_DTYPES):
                raise _quantised(file, name, dtype)
            if dtype in BUFFER_DTYPES:
                buffers.append(f"{name[:80]} is stored as {dtype}")
                continue
            if name in places:
                raise CheckpointError(
                    f"{folder.name} has two models: {name} is in {places[name].name} and in {file.name}",
                    hint="remove the files of one of them",
                )
            found[name], places[name] = size, file
    if shape.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"the weights in {folder.name} do not fit its config.json: {len(missing)} missing {missing[:2]}, "
            f"{len(extra)} unexpected {extra[:2]}" + (f", and {buffers[0]}" if buffers else "")
        )
    for name, size in expected.items():
        if found[name] != size:
            raise CheckpointError(f"{name} has shape {list(found[name])}, and config.json asks for {list(size)}")
    return files


def checkpoint_notes(folder: Path) -> list[str]:
    """What is read otherwise than a checked folder suggests, and which of its files and tensors are left out."""
    files, notes = weight_files(folder), []
    if read_object(folder / "config.json").get("tie_word_embeddings") is True and has_own_head(folder):
        notes.append(
            "config.json says tie_word_embeddings: true, and the stored lm_head differs from the embedding; "
            "the stored head is used and the two are not tied, as in transformers 5"
        )
    unread = sorted({str(name) for name in weight_map(folder).values()}.difference(file.name for file in files))
    if unread:
        notes.append(f"left out: {INDEX}, which names other files, such as {unread[0]}; {files[0].name} is read")
    others = sorted(path.name for path in folder.glob("*.safetensors") if path not in files)
    if others:
        notes.append(f"left out: {len(others)} other files of weights, such as {others[0]}")
    buffers = [name for file in files for name in buffer_names(file)]
    if buffers:
        notes.append(f"left out: {len(buffers)} tensors that are no weights of the model, such as {buffers[0]}")
    return notes


def model_files(folder: Path) -> list[Path]:
    """The files of a checked model folder that belong to its model: configuration, tokenizer, weights and their index.

    Read-me files, other formats, and weights that are no part of the model are left out; `checkpoint_notes` names the
    last.
    """
    weights = weight_files(folder)
    indexed = {str(name) for name in weight_map(folder).values()}
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix in MODEL_SUFFIXES
        and (path.suffix != ".safetensors" or path in weights)
        and (path.name != INDEX or indexed == {file.name for file in weights})
    )


def write_as_read(folder: Path, links: Path) -> None:
    """Replace links by files where a model is read otherwise than its files say: a head of its own, buffers.

    Args:
        folder: a checked model folder.
        links: a folder with a link to each of its files.
    """
    config = read_config(folder)
    if config != read_object(folder / "config.json"):
        (links / "config.json").unlink()
        (links / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in weight_files(folder):
        if buffer_names(file):
            (links / file.name).unlink()
            write_without_buffers(file, links / file.name)


def buffer_names(file: Path) -> list[str]:
    """Names of the buffers in a safetensors file."""
    return [name for name, (dtype, _) in read_header(file).items() if dtype in BUFFER_DTYPES]


def _quantised(file: Path, name: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{file.name}: {name[:80]} is stored as {dtype}",
        hint=f"start from unquantised weights: {', '.join(WEIGHT_DTYPES)}",
    )
