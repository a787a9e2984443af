"""Layers that keep the numbers which they had in another model, so that their files are that model's, to the byte.

Names of weights have the layer's number, and names are in the files. A child that lacks layers of its parent therefore
leaves gaps in the numbers; its `config.json` has an empty layer in each, for whoever knows no gaps, and says so under
`SKIPS_LAYERS`. In memory a model has no gaps: names are translated where files are read. Light: no torch.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

SKIPS_LAYERS = "skips_layers"
"""Key of a `config.json`: a layer with neither attention nor FFN is a gap, and no layer of the model."""
LAYERS = "model.layers."
"""Beginning of the names of what is in a decoder layer."""
GAP: dict[str, Any] = {
    "attention": {"no_op": True, "n_heads_in_group": None},
    "ffn": {"no_op": True, "intermediate_size": None},
}
"""The block configuration of a gap."""


def name_in_model(name: str, numbers: Sequence[int]) -> str:
    """The name that a weight has in memory.

    Args:
        name: in the files.
        numbers: of each layer in the files, rising.
    """
    number, rest = _parts(name)
    return name if number not in numbers else f"{LAYERS}{numbers.index(number)}.{rest}"


def name_in_files(name: str, numbers: Sequence[int]) -> str:
    """The name that a weight has in the files; the inverse of `name_in_model`."""
    place, rest = _parts(name)
    return name if place is None else f"{LAYERS}{numbers[place]}.{rest}"


def _parts(name: str) -> tuple[int | None, str]:
    """Layer and rest of a name; no layer where it is of none."""
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    return (int(number), rest) if name.startswith(LAYERS) and number.isdecimal() else (None, name)


def with_gaps(config: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """The `config.json` of a heterogeneous model whose layers have these numbers.

    Args:
        config: of the model without gaps.
        numbers: of each of its layers, rising.
    """
    layers = range(numbers[-1] + 1)
    blocks = dict(zip(numbers, config["block_configs"], strict=True))
    values = {**config, "num_hidden_layers": len(layers), SKIPS_LAYERS: True}
    values["block_configs"] = [blocks.get(number, GAP) for number in layers]
    if "parent_layers" in config:
        # A gap passes on what the layer before it gives, and so stands where that one ends.
        behind = [0, *config["parent_layers"]]
        values["parent_layers"] = [behind[bisect_right(numbers, number)] for number in layers]
    return values
