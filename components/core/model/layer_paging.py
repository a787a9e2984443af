"""Models larger than memory: only one decoder layer is in memory at a time.

A layer is loaded when one of its modules runs or its state is read, and evicts the layer that was loaded before. Code
that visits the layers in order, and does all of its work at a layer before the next, reads each layer once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from components.core.model.inspection import RECOMPUTED, weight_files
from components.core.model.layer_numbering import LAYERS

State = Mapping[str, Tensor]
"""Tensors by name."""
ReadLayer = Callable[[int], State]
"""Function from a layer number to the tensors of the layer, by their names within it."""


class LayerFiles:
    """Reads the layers of a model folder, one at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype | None, numbers: Sequence[int]) -> None:
        """Find the files of each layer.

        Args:
            folder: a checked model folder; it must stay until the last layer was read.
            dtype: dtype of the weights in memory; None: as stored.
            numbers: number of each layer in the files.
        """
        self._dtype, self._numbers = dtype, numbers
        self._files: dict[int, set[Path]] = {}
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():
                    if name.startswith(LAYERS) and not name.endswith(RECOMPUTED):
                        number = int(name.removeprefix(LAYERS).partition(".")[0])
                        self._files.setdefault(number, set()).add(file)

    def read(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer."""
        number = self._numbers[layer]
        prefix, state = f"{LAYERS}{number}.", {}
        for file in sorted(self._files[number]):
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():
                    if name.startswith(prefix) and not name.endswith(RECOMPUTED):
                        tensor = reader.get_tensor(name)
                        state[name.removeprefix(prefix)] = tensor.to(self._dtype or tensor.dtype)
        return state


class _Pager:
    """Keeps one layer in memory and evicts it when another is loaded."""

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
