"""A library on disk: one file a variant."""

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file

from components.search.space import Variant
from components.search.variants import Weights

BlockKey = tuple[int, Variant]
"""A variant in its layer."""


def save_block(folder: Path, key: BlockKey, weights: Weights) -> None:
    """Write one variant as a file of its own, so that models that share it share the bytes."""
    path = block_path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, path)


def load_block(folders: Iterable[Path], key: BlockKey) -> Weights:
    """Read one variant from the library folder that has it.

    Raises:
        FileNotFoundError: none has it.
    """
    for folder in folders:
        path = block_path(folder, key)
        if path.is_file():
            return load_file(path)
    raise FileNotFoundError(f"no library has {block_path(Path(), key)}")


def block_path(folder: Path, key: BlockKey) -> Path:
    """Where a library keeps a variant."""
    layer, variant = key
    return folder / f"layer-{layer}" / f"{variant.name}.safetensors"
