"""Writes one safetensors file for each sub-block, so that models which share a sub-block share its file in a store.

A file is named by layer and part; its tensors have their names in the whole model. Equal tensors give equal files.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from components.core.model.inspection import INDEX

LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<module>\w+)\.")
PARTS = {
    "input_layernorm": "attention",
    "self_attn": "attention",
    "post_attention_layernorm": "ffn",
    "mlp": "ffn",
}
"""Part of each module of a layer."""


def file_of(name: str) -> str:
    """Name of the file of a tensor: the file of its sub-block, or one of its own outside the layers."""
    found = LAYER.match(name)
    if found is None:
        return f"{name.removesuffix('.weight').removeprefix('model.')}.safetensors"
    return f"layer-{found['layer']}-{PARTS[found['module']]}.safetensors"


def write_block(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write one file; equal tensors give equal bytes."""
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})


def write_blocks(pieces: Iterable[Mapping[str, Tensor]], folder: Path) -> None:
    """Write all files of a model, and the index of its tensors.

    Args:
        pieces: the state of the model, in pieces of whole sub-blocks; one piece is in memory at a time.
        folder: where the files are written.
    """
    size, weight_map = 0, {}
    for piece in pieces:
        files: dict[str, dict[str, Tensor]] = {}
        for name, tensor in piece.items():
            files.setdefault(file_of(name), {})[name] = tensor
            size += tensor.numel() * tensor.element_size()
            weight_map[name] = file_of(name)
        for file, weights in files.items():
            write_block(folder / file, weights)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
