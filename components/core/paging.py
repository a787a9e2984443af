"""A model larger than memory: one decoder layer is held at a time, read from the model's folder when it is needed.

Nobody has to know: to run a module of a layer, or to ask for its state, brings the layer in place of the one before.
Whoever goes through the layers in order, with as much as possible at each, reads the files once.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from components.core.inspection import weight_files

LAYERS = "model.layers."
"""Beginning of the names of what is in a decoder layer."""


class _Pager:
    """Keeps one layer in memory."""

    def __init__(self, folder: Path, layers: nn.ModuleList, dtype: torch.dtype | None) -> None:
        self.layers, self.dtype = layers, dtype
        self.here: int | None = None
        self.files: dict[int, set[Path]] = {}
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():
                    if name.startswith(LAYERS):
                        number = int(name.removeprefix(LAYERS).partition(".")[0])
                        self.files.setdefault(number, set()).add(file)

    def bring(self, number: int) -> None:
        """Read a layer, unless it is here, in place of the one that is."""
        if number == self.here:
            return
        if self.here is not None:
            self.layers[self.here].to("meta")
        wanted = self.layers[number]
        wanted.load_state_dict(
            dict(self._weights(number, {name for name, _ in wanted.named_parameters()})), assign=True
        )
        self.here = number

    def _weights(self, number: int, names: set[str]) -> Iterable[tuple[str, Tensor]]:
        prefix = f"{LAYERS}{number}."
        for file in sorted(self.files[number]):
            with safe_open(file, framework="pt") as reader:
                for name in names.intersection(key.removeprefix(prefix) for key in reader.keys()):
                    tensor = reader.get_tensor(prefix + name)
                    yield name, tensor.to(self.dtype or tensor.dtype)


def page_layers(layers: nn.ModuleList, folder: Path, dtype: torch.dtype | None) -> None:
    """Read these layers when they are needed, one at a time.

    Args:
        layers: decoder layers without weights, on the meta device.
        folder: the model's; its files have been checked, and stay.
        dtype: of the weights in memory; as stored where None.
    """
    pager = _Pager(folder, layers, dtype)
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
