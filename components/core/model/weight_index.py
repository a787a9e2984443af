"""Which safetensors files of a folder are its model, and what is stored in them; from names and headers alone.

Files are chosen as transformers chooses them. What it passes over in silence is named here, so that the user learns
which files and tensors are no part of the model. Imports no torch.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from components.core.base.errors import CheckpointError

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
SINGLE_FILE, ADAPTER_FILE = "model.safetensors", "adapter_model.safetensors"
MISTRAL_FILES = "consolidated*.safetensors"
"""Weights in Mistral's original format: other names, and other places of the rotary positions."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_JSON_BYTES = 64 << 20
"""Maximum size of a JSON file that is parsed; configurations and indexes are far smaller."""
MAX_HEADER_BYTES = 16 << 20
"""Maximum header of a safetensors file: 100,000 tensors. Parsing takes several times as much memory."""
WEIGHT_DTYPES = ("F64", "F32", "BF16", "F16")
"""Types of unquantised weights in safetensors files."""
BUFFER_DTYPES = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""Types of counters and masks; a model of ours has none, and transformers passes over those that it does not know."""
RECOMPUTED = ".rotary_emb.inv_freq"
"""End of the names of tensors that old checkpoints contain; they are computed instead of read."""
CHUNK_BYTES = 16 << 20

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape of each tensor of a file."""


class OpenFile(Protocol):
    """An open safetensors file."""

    def keys(self) -> Sequence[str]:
        """Names of its tensors."""

    def get_slice(self, name: str) -> Any:
        """A tensor that is not read yet."""


def weight_names(opened: OpenFile) -> list[str]:
    """Names of the weights in an open safetensors file; buffers, which are no part of a model, are left out."""
    return [
        name
        for name in opened.keys()
        if not name.endswith(RECOMPUTED) and str(opened.get_slice(name).get_dtype()) not in BUFFER_DTYPES
    ]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: `model.safetensors`, or those of its index, or all of them.

    Raises:
        CheckpointError: there are none, some are missing, or the folder has two models.
    """
    single = folder / SINGLE_FILE
    indexed = _indexed_names(folder)
    present = [name for name in indexed if _is_inside(folder, name)]
    if single.is_file():
        others = [name for name in present if name != SINGLE_FILE]
        if others and SINGLE_FILE not in indexed:
            raise CheckpointError(
                f"{folder.name} has two models: {SINGLE_FILE}, and {len(others)} files that {INDEX} names, such as "
                f"{others[0]}",
                hint=f"remove {SINGLE_FILE}, or {INDEX} and its files",
            )
        return [single]
    refuse_dangling(single)
    if indexed:
        return _all_present(folder, indexed, present)
    files = [path for path in _safetensors(folder) if not _has_other_format(path)]
    for path in files:
        refuse_dangling(path)
    return files or _refuse_without_weights(folder)


def _is_inside(folder: Path, name: str) -> bool:
    """Whether an index names a file of the folder itself, which is there."""
    return Path(name).name == name and (folder / name).is_file()


def _all_present(folder: Path, indexed: Sequence[str], present: Sequence[str]) -> list[Path]:
    """The files of an index, which all have to be there."""
    missing = [name for name in indexed if name not in present]
    for name in missing:
        if Path(name).name == name:
            refuse_dangling(folder / name)
    if missing:
        raise CheckpointError(
            f"{INDEX} names {len(missing)} files that are not there: {', '.join(missing[:3])}",
            hint="copy or download the rest",
        )
    return [folder / name for name in indexed]


def _safetensors(folder: Path) -> list[Path]:
    """All safetensors files but those that macOS writes beside a copy."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("._"))


def _has_other_format(path: Path) -> bool:
    """Whether the name says that the weights in it are no model of Hugging Face's."""
    return path.name == ADAPTER_FILE or path.match(MISTRAL_FILES)


def _refuse_without_weights(folder: Path) -> list[Path]:
    """Say what is there instead of weights."""
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder.name} has an adapter alone ({ADAPTER_FILE}), not a model",
            hint="merge it first: PeftModel.merge_and_unload() and save_pretrained(folder)",
        )
    if original := sorted(folder.glob(MISTRAL_FILES)):
        raise CheckpointError(
            f"the weights in {folder.name} are in Mistral's original format ({original[0].name}), not in that of "
            "Hugging Face",
            hint=f"download the same model's {SINGLE_FILE}, or {INDEX} and its files",
        )
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED_SUFFIXES):
        raise CheckpointError(
            f"the weights in {folder.name} are pickled ({pickled[0]}), and reading a pickle can run any code",
            hint="save them as safetensors: model.save_pretrained(folder)",
        )
    raise CheckpointError(f"{folder} has no weights", hint="copy its *.safetensors into the folder of its config.json")


def refuse_dangling(file: Path) -> None:
    """Refuse a link whose target is not there, as an interrupted download or a plain copy of a hub cache leaves it.

    Raises:
        CheckpointError: with the target.
    """
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file} is a link to {os.readlink(file)}, which is not there",
            hint="download the model again, or copy it with `cp -rL`, which copies what links lead to",
        )


def _indexed_names(folder: Path) -> list[str]:
    """The files that the index names; none without an index."""
    return sorted({str(name) for name in weight_map(folder).values()})


def weight_map(folder: Path) -> Mapping[str, Any]:
    """File of each tensor after the index of a folder; empty without an index.

    Raises:
        CheckpointError: the index is damaged.
    """
    if not (folder / INDEX).is_file():
        refuse_dangling(folder / INDEX)
        return {}
    names = read_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{INDEX} has no weight_map", hint="copy or download it again")
    return names


def read_header(file: Path) -> Header:
    """Type and shape of every tensor of a safetensors file.

    Raises:
        CheckpointError: the header is damaged or does not match the size of the file.
    """
    with file.open("rb") as stream:
        prefix = stream.read(8)
    if len(prefix) < 8 or struct.unpack("<Q", prefix)[0] > MAX_HEADER_BYTES:
        raise _damaged(file, f"it begins with no header of at most {MAX_HEADER_BYTES:,} bytes")
    try:
        with safe_open(file, "numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: (str(found.get_dtype()), tuple(found.get_shape())) for name, found in slices.items()}
    except SafetensorError as error:
        raise _damaged(file, str(error)[:200]) from None


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file.name} is damaged: {reason}", hint="copy or download it again")


def has_own_head(folder: Path) -> bool:
    """Whether a folder stores a head whose values are not those of its embedding.

    A folder that cannot be read has none here: `check_weights` says what is wrong with it.
    """
    try:
        indexed = weight_map(folder)
        if indexed and HEAD not in indexed and not (folder / SINGLE_FILE).is_file():
            return False
        found = {name: file for file in weight_files(folder) for name in read_header(file)}
        if HEAD not in found or EMBEDDING not in found:
            return False
        files = [(file, file.stat()) for file in (found[EMBEDDING], found[HEAD])]
    except (CheckpointError, OSError):
        return False
    embedding, head = ((str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in files)
    return not _equal_bytes(embedding, head)


@lru_cache(maxsize=64)
def _equal_bytes(embedding: tuple[str, int, int], head: tuple[str, int, int]) -> bool:
    """Whether embedding and head are stored as the same bytes. Each file comes with its size and time of change."""
    sizes_and_chunks = [_stored_bytes(Path(file[0]), name) for file, name in ((embedding, EMBEDDING), (head, HEAD))]
    (one_size, one), (other_size, other) = sizes_and_chunks
    return one_size == other_size and all(a == b for a, b in zip(one, other, strict=True))


def _stored_bytes(file: Path, name: str) -> tuple[int, Iterator[bytes]]:
    """Size of a stored tensor, and its bytes in chunks."""
    header, start = _raw_header(file)
    begin, end = header[name]["data_offsets"]
    return end - begin, _chunks(file, start + begin, end - begin)


def _raw_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a checked file as JSON, and where its tensors begin."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(size))
    return header, 8 + size


def _chunks(file: Path, start: int, size: int) -> Iterator[bytes]:
    """Some bytes of a file, in chunks."""
    with file.open("rb") as stream:
        stream.seek(start)
        while size > 0 and (chunk := stream.read(min(size, CHUNK_BYTES))):
            size -= len(chunk)
            yield chunk


def write_without_buffers(source: Path, target: Path) -> None:
    """Copy a checked safetensors file without its buffers, which vLLM would refuse.

    The header is written here, because the library writes tensors of numpy, which has no bfloat16, or of torch, which
    this module does without.
    """
    header, start = _raw_header(source)
    metadata = header.pop("__metadata__", None)
    weights = sorted(
        ((name, entry) for name, entry in header.items() if entry["dtype"] not in BUFFER_DTYPES),
        key=lambda item: item[1]["data_offsets"],
    )
    described: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, entry in weights:
        begin, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        described[name] = {**entry, "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, entry in weights:
            begin, end = entry["data_offsets"]
            for chunk in _chunks(source, start + begin, end - begin):
                out.write(chunk)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it is too large, or not a JSON object.
    """
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} is larger than {MAX_JSON_BYTES:,} bytes", hint="copy or download it again")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return values
