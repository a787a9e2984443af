"""What a checkpoint is, and whether it may be read, from its configuration and file headers alone. Light: no torch."""

import json
from pathlib import Path
from typing import Any

from components.core.base.errors import CheckpointError
from components.core.model.architecture import WEIGHT_BYTES, Architecture
from components.core.model.families import refuse_unsupported
from components.core.model.safetensors_header import read_shapes

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 << 20
"""What is parsed at once; configurations and indexes are far smaller."""
RECOMPUTED = ".rotary_emb.inv_freq"
"""Ending of names that old checkpoints carry and nobody reads."""


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Tell of a checkpoint folder or a `config.json`, also where weights are absent.

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


def check_checkpoint(folder: Path) -> Architecture:
    """Refuse, before any work starts, a folder that cannot or must not be read.

    Raises:
        CheckpointError: pickled weights, code of its own, an unsupported family, a missing or damaged file, or weights
            that do not fit the configuration; says which, and the way out.
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
    """Make sure that every weight is there, whole, and of the shape that the configuration asks for.

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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index where it has one.

    Raises:
        CheckpointError: there are none, or some are missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        files = _indexed_files(folder)
    if not files:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES)
        if pickled:
            raise CheckpointError(
                f"the weights in {folder.name} are pickled ({pickled[0]}), and reading a pickle can run any code",
                hint="save them as safetensors: model.save_pretrained(folder)",
            )
        raise CheckpointError(f"{folder} has no weights", hint="copy its *.safetensors beside its config.json")
    return files


def _indexed_files(folder: Path) -> list[Path]:
    """The files that an index names; all of them in the folder itself."""
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
