"""A library on disk: one file a variant."""

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file

from components.core.model.layer_files import write_block
from components.core.model.layer_numbering import LAYERS
from components.search.space.layer_space import Variant
from components.search.space.variant_weights import Weights

BlockKey = tuple[int, Variant]
"""A variant in its layer."""


def block_name(key: BlockKey) -> str:
    """Name of a variant of a layer, unique in a library."""
    layer, variant = key
    return f"{layer}/{variant.name}"


def save_block(folder: Path, key: BlockKey, weights: Weights) -> None:
    """Write one variant as the file that a model has which holds it in this layer: a store keeps the bytes once."""
    path = block_path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_block(path, {f"{_prefix(key)}{name}": tensor for name, tensor in weights.items()})


def load_block(folders: Iterable[Path], key: BlockKey) -> Weights:
    """Read one variant from the library folder that has it.

    Raises:
        FileNotFoundError: none has it.
    """
    for folder in folders:
        path = block_path(folder, key)
        if path.is_file():
            return {name.removeprefix(_prefix(key)): tensor for name, tensor in load_file(path).items()}
    raise FileNotFoundError(f"no library has {block_path(Path(), key)}")


def _prefix(key: BlockKey) -> str:
    """What a model puts before the names of tensors within the layer."""
    return f"{LAYERS}{key[0]}."


def block_path(folder: Path, key: BlockKey) -> Path:
    """Where a library keeps a variant."""
    layer, variant = key
    return folder / f"layer-{layer}" / f"{variant.name}.safetensors"
