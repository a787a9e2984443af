"""Reads and writes weights a piece at a time, for processes that have a part of a model in memory.

Shape letters: N rows (the first dimension of a weight); a vector's rows are its values.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from components.core.model.inspection import read_architecture
from components.core.model.layer_numbering import name_in_model
from components.core.model.weight_index import INDEX, read_header, weight_files, weight_names

PIECE_VALUES = 1 << 22
"""Values of a weight that are read at once: 16 MiB in float32."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights by their names in safetensors files."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

FetchWeight = Callable[[str], Iterator[Tensor]]
"""Function from the name of a weight to its rows in order, some at a time, on the CPU."""


class StoredWeights:
    """The weights of a model folder, read by rows."""

    def __init__(self, folder: Path) -> None:
        """Find the file of each weight.

        Args:
            folder: a checked model folder.

        Raises:
            CheckpointError: no safetensors, or no readable configuration.
        """
        numbers = read_architecture(folder).layer_numbers
        self._places: dict[str, tuple[Path, str]] = {}
        self._headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in weight_files(folder):
            header = read_header(file)
            with safe_open(file, framework="pt") as opened:
                names = weight_names(opened)
            for name in names:
                self._places[name_in_model(name, numbers)] = (file, name)
                self._headers[name_in_model(name, numbers)] = header[name]

    def dtype(self, name: str) -> torch.dtype:
        """The type that a weight is stored in."""
        return DTYPES[self._headers[name][0]]

    def num_rows(self, name: str) -> int:
        """Rows of a weight."""
        return self._headers[name][1][0]

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Rows `start … stop - 1` of a weight, a piece at a time: the number of the first row, and the rows.

        The file is opened anew for each piece, because pages of an open file stay in memory. A piece is part of the
        file's mapping: copy it.
        """
        file, stored = self._places[name]
        rows = max(1, PIECE_VALUES // math.prod(self._headers[name][1][1:]))
        for first in range(start, stop, rows):
            with safe_open(file, framework="pt") as opened:
                yield first, opened.get_slice(stored)[first : min(first + rows, stop)]

    @torch.no_grad()
    def read_rows(self, name: str, first: int, into: Tensor) -> None:
        """Read rows `first …` of a weight into a tensor, converted to its type; rows that are not stored stay."""
        for start, piece in self.pieces(name, first, min(first + len(into), self.num_rows(name))):
            into[start - first : start - first + len(piece)].copy_(piece)


def write_weights(folder: Path, weights: Mapping[str, Tensor], fetch: FetchWeight, max_shard_size: str) -> None:
    """Write the weights of a model, a piece at a time, to the files that `save_torch_state_dict` would write.

    Args:
        folder: where the files are written.
        weights: for each weight, a tensor of its shape and type; one on the meta device will do.
        fetch: reads a weight.
        max_shard_size: maximum size of a file; a model that needs several gets an index.
    """
    split = split_torch_state_dict_into_shards(dict(weights), max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, {name: weights[name] for name in names}, fetch)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_file(path: Path, weights: Mapping[str, Tensor], fetch: FetchWeight) -> None:
    """Write one file, in the order and with the header of the library, which wants all tensors in memory."""
    # The library puts wide types first, so that each tensor is aligned.
    names = sorted(weights, key=lambda name: (-weights[name].element_size(), DTYPE_NAMES[weights[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + weights[name].numel() * weights[name].element_size()
        shape = list(weights[name].shape)
        header[name] = {"dtype": DTYPE_NAMES[weights[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for piece in fetch(name):
                out.write(piece.contiguous().view(torch.uint8).numpy().data)
