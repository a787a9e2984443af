"""What a safetensors file holds, read from its header, and whether the file can be whole. Light: no torch."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from components.core.base.config import Config
from components.core.base.errors import CheckpointError

DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
MAX_HEADER_BYTES = 16 << 20
"""A hundred thousand tensors; what is parsed takes many times as much memory."""
MAX_DIMS, MAX_SIZE = 8, 1 << 48
"""Dimensions of a tensor, and the largest size or offset."""
LENGTH_BYTES = 8


Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]


class TensorEntry(Config):
    """One tensor of the header."""

    dtype: str
    """Name of its type, such as F32."""
    shape: tuple[Size, ...] = Field(max_length=MAX_DIMS)
    """Sizes of its dimensions."""
    data_offsets: tuple[Size, Size]
    """First byte and the byte after the last, counted from the end of the header."""


METADATA: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])
ENTRIES: TypeAdapter[dict[str, TensorEntry]] = TypeAdapter(dict[str, TensorEntry])


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor.

    Raises:
        CheckpointError: the file is truncated, its header was tampered with, or the weights are quantised.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == LENGTH_BYTES else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise _damaged(file, f"its header cannot have {length} bytes in a file of {size}")
        text = stream.read(length)
    entries = _parse(file, text)
    _check_layout(file, entries, size - LENGTH_BYTES - length)
    return {name: entry.shape for name, entry in entries.items()}


def _parse(file: Path, text: bytes) -> dict[str, TensorEntry]:
    """The header's tensors, all of a known type."""
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles)
        if not isinstance(header, dict):
            raise ValueError("no object")
        METADATA.validate_python(header.pop("__metadata__", {}))
        entries = ENTRIES.validate_python(header)
    except (ValueError, RecursionError):
        raise _damaged(file, "its header is not one of safetensors") from None
    for name, entry in entries.items():
        if entry.dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{file.name}: {name[:80]} is stored as {entry.dtype[:80]}",
                hint=f"start from unquantised weights: {', '.join(DTYPE_BYTES)}",
            )
    return entries


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; one that names a key twice could mean one thing to us and another to the next reader."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _check_layout(file: Path, entries: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """The tensors fill the rest of the file, each in turn, each as long as its shape and type make it."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end or stop - start != _num_bytes(entry):
            raise _damaged(file, f"{name[:80]} does not lie where its shape and type put it")
        end = stop
    if end != data_bytes:
        raise _damaged(file, f"its header announces {end} bytes of weights, and {data_bytes} are there")


def _num_bytes(entry: TensorEntry) -> int:
    """Bytes of a tensor."""
    return math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file.name} is damaged: {reason}", hint="copy or download it again")
