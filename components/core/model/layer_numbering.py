"""Layer numbers in files and in memory.

A child keeps the layer numbers of its parent in its files, so that the file of a layer that did not change is equal to
the parent's file, byte for byte, and is stored once. Layers that the child does not have are gaps in these numbers: its
`config.json` describes each gap as a layer without attention and FFN, and has the key `SKIPS_LAYERS`. In memory a model
has no gaps: the names of weights are translated where files are read. Imports no torch.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

SKIPS_LAYERS = "skips_layers"
"""Key of `config.json`. Where it is set, a layer without attention and FFN is a gap and not a layer of the model."""
LAYERS = "model.layers."
"""Prefix of the names of weights in a decoder layer."""
GAP: dict[str, Any] = {
    "attention": {"no_op": True, "n_heads_in_group": None},
    "ffn": {"no_op": True, "intermediate_size": None},
}
"""The block configuration of a gap."""


def name_in_model(name: str, numbers: Sequence[int]) -> str:
    """Name of a weight in memory.

    Args:
        name: name in the files.
        numbers: number of each layer in the files, ascending.
    """
    number, rest = _parts(name)
    return name if number not in numbers else f"{LAYERS}{numbers.index(number)}.{rest}"


def name_in_files(name: str, numbers: Sequence[int]) -> str:
    """Name of a weight in the files; the inverse of `name_in_model`."""
    index, rest = _parts(name)
    return name if index is None else f"{LAYERS}{numbers[index]}.{rest}"


def _parts(name: str) -> tuple[int | None, str]:
    """Layer number and rest of a name; the number is None outside the layers."""
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    return (int(number), rest) if name.startswith(LAYERS) and number.isdecimal() else (None, name)


def with_gaps(config: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """The `config.json` of a heterogeneous model, with gaps between its layer numbers.

    Args:
        config: configuration without gaps.
        numbers: number of each layer in the files, ascending.
    """
    layers = range(numbers[-1] + 1)
    blocks = dict(zip(numbers, config["block_configs"], strict=True))
    values = {**config, "num_hidden_layers": len(layers), SKIPS_LAYERS: True}
    values["block_configs"] = [blocks.get(number, GAP) for number in layers]
    if "parent_layers" in config:
        # The output of a gap is that of the layer before it, and so is its depth in the parent.
        depths = [0, *config["parent_layers"]]
        values["parent_layers"] = [depths[bisect_right(numbers, number)] for number in layers]
    return values
