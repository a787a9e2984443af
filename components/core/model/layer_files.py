"""Files of parts of a model: written one per sub-block, read one layer at a time.

Models that share a sub-block share its file in a store: a file is named by layer and part, its tensors have their names
in the whole model, and equal tensors give equal files.

A paged model is larger than memory, and has only one decoder layer in memory at a time. A layer is loaded when one of
its modules runs or its state is read, and evicts the layer that was loaded before. Code that visits the layers in
order, and does all of its work at a layer before the next, reads each layer once.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from components.core.model.layer_numbering import LAYERS
from components.core.model.weight_index import INDEX, weight_files, weight_names

LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<module>\w+)\.")
PARTS = {
    "input_layernorm": "attention",
    "self_attn": "attention",
    "post_attention_layernorm": "ffn",
    "mlp": "ffn",
}
"""Part of each module of a layer."""


def file_of(name: str) -> str:
    """Name of the file of a tensor: that of its sub-block; a tensor outside the layers has a file of its own."""
    found = LAYER.match(name)
    if found is None:
        return f"{name.removesuffix('.weight').removeprefix('model.')}.safetensors"
    return f"layer-{found['layer']}-{PARTS[found['module']]}.safetensors"


def write_block(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write one file; equal tensors give equal bytes."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})


def write_blocks(pieces: Iterable[Mapping[str, Tensor]], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write all files of a model, and the index of its tensors.

    Args:
        pieces: the state of the model; each piece contains whole sub-blocks, and one piece is in memory at a time.
        folder: where the files are written.
        dtype: dtype of the written weights; None: their own.
    """
    size, weight_map = 0, {}
    for piece in pieces:
        files: dict[str, dict[str, Tensor]] = {}
        for name, tensor in piece.items():
            written = tensor.to(dtype or tensor.dtype)
            files.setdefault(file_of(name), {})[name] = written
            size += written.numel() * written.element_size()
            weight_map[name] = file_of(name)
        for file, weights in files.items():
            write_block(folder / file, weights)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


State = Mapping[str, Tensor]
"""Tensors by name."""
ReadLayer = Callable[[int], State]
"""Function from a layer number to the tensors of the layer, by their names within it."""


class LayerFiles:
    """Reads the layers of a model folder, one at a time."""

    def __init__(
        self, folder: Path, dtype: torch.dtype | None, numbers: Sequence[int], device: torch.device | None = None
    ) -> None:
        """Find the files of each layer.

        Args:
            folder: a checked model folder; it must stay until the last layer was read.
            dtype: dtype of the weights in memory; None: as stored.
            numbers: number of each layer in the files.
            device: device of the weights in memory; None: the CPU.
        """
        self._dtype, self._numbers, self._device = dtype, numbers, device
        self._files: dict[int, set[Path]] = {}
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as reader:
                for name in weight_names(reader):
                    if name.startswith(LAYERS):
                        number = int(name.removeprefix(LAYERS).partition(".")[0])
                        self._files.setdefault(number, set()).add(file)

    def read(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer."""
        number = self._numbers[layer]
        prefix, state = f"{LAYERS}{number}.", {}
        for file in sorted(self._files[number]):
            with safe_open(file, framework="pt") as reader:
                for name in weight_names(reader):
                    if name.startswith(prefix):
                        tensor = reader.get_tensor(name)
                        state[name.removeprefix(prefix)] = tensor.to(self._device, self._dtype or tensor.dtype)
        return state


class _Pager:
    """Has one layer in memory, and evicts it when another is loaded."""

    def __init__(self, layers: nn.ModuleList, read: ReadLayer) -> None:
        self._layers, self._read = layers, read
        self._loaded: int | None = None

    def load(self, number: int) -> None:
        """Load a layer and evict the one before, unless it is loaded already."""
        if number == self._loaded:
            return
        if self._loaded is not None:
            self._layers[self._loaded].to("meta")
        self._layers[number].load_state_dict(self._read(number), assign=True)
        self._loaded = number


def page_layers(layers: nn.ModuleList, read: ReadLayer) -> None:
    """Load these layers on first use, one at a time.

    Args:
        layers: decoder layers on the meta device.
        read: reads the tensors of a layer.
    """
    pager = _Pager(layers, read)
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if any(True for _ in module.parameters(recurse=False)):
                _load_before_use(pager, number, module)


def _load_before_use(pager: _Pager, number: int, module: nn.Module) -> None:
    def before(*_: Any) -> None:
        pager.load(number)

    module.register_forward_pre_hook(before)
    module.register_state_dict_pre_hook(before)


def is_paged(layers: nn.ModuleList) -> bool:
    """Whether some of the layers are not in memory."""
    return any(parameter.is_meta for parameter in layers.parameters())


def state_outside_layers(model: nn.Module) -> dict[str, Tensor]:
    """Weights outside the layers: embeddings, final norm, and the head where it is not tied."""
    return {name: weight.detach() for name, weight in model.named_parameters() if not name.startswith(LAYERS)}


def state_in_pieces(model: nn.Module, layers: nn.ModuleList, numbers: Sequence[int]) -> Iterator[State]:
    """The state of a model piece by piece: the weights outside the layers, then each layer.

    A paged model has one layer in memory at a time.

    Args:
        model: the model.
        layers: its decoder layers.
        numbers: number of each layer in the names of the weights.
    """
    yield state_outside_layers(model)
    for number, layer in zip(numbers, layers, strict=True):
        yield layer.state_dict(prefix=f"{LAYERS}{number}.")
