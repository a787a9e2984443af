"""A model larger than memory: one decoder layer is held at a time, and the next is read in its place when it is needed.

Nobody has to know: to run a module of a layer, or to ask for its state, brings the layer in place of the one before.
Whoever goes through the layers in order, with as much as possible at each, reads each once.
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
"""The tensors of a layer by their names within it, for its number."""


class LayerFiles:
    """Reads the layers of a model folder, one at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype | None, numbers: Sequence[int]) -> None:
        """Find the files of each layer.

        Args:
            folder: its files have been checked, and stay.
            dtype: of the weights in memory; as stored where None.
            numbers: of each layer in the files.
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
        """One layer."""
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
    """Keeps one layer in memory."""

    def __init__(self, layers: nn.ModuleList, read: ReadLayer) -> None:
        self._layers, self._read = layers, read
        self._here: int | None = None

    def bring(self, number: int) -> None:
        """Read a layer, unless it is here, in place of the one that is."""
        if number == self._here:
            return
        if self._here is not None:
            self._layers[self._here].to("meta")
        self._layers[number].load_state_dict(self._read(number), assign=True)
        self._here = number


def page_layers(layers: nn.ModuleList, read: ReadLayer) -> None:
    """Read these layers when they are needed, one at a time.

    Args:
        layers: decoder layers without weights, on the meta device.
        read: where a layer comes from.
    """
    pager = _Pager(layers, read)
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if any(True for _ in module.parameters(recurse=False)):
                _bring_before_use(pager, number, module)


def _bring_before_use(pager: _Pager, number: int, module: nn.Module) -> None:
    def before(*_: Any) -> None:
        pager.bring(number)

    module.register_forward_pre_hook(before)
    module.register_state_dict_pre_hook(before)


def is_paged(layers: nn.ModuleList) -> bool:
    """Whether some of the layers are elsewhere."""
    return any(parameter.is_meta for parameter in layers.parameters())


def state_outside_layers(model: nn.Module) -> dict[str, Tensor]:
    """What a model has beside its layers: embeddings, final norm, and a head that is not tied."""
    return {name: weight.detach() for name, weight in model.named_parameters() if not name.startswith(LAYERS)}


def state_in_pieces(model: nn.Module, layers: nn.ModuleList, numbers: Sequence[int]) -> Iterator[State]:
    """The state of a model in pieces, of which a paged one holds a single layer: what is outside, then each layer.

    Args:
        model: what the layers are of.
        layers: its decoder layers.
        numbers: what each is called.
    """
    yield state_outside_layers(model)
    for number, layer in zip(numbers, layers, strict=True):
        yield layer.state_dict(prefix=f"{LAYERS}{number}.")
