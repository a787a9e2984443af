"""Token files, memory-mapped, in the layout of Megatron-Core's `IndexedDataset`.

`NAME.bin` has the token ids of all sequences, one after the other. `NAME.idx` has the length and the place of each
sequence, and the number of the first sequence of each document:

    9 bytes MMIDIDX 0 0, uint64 version 1, uint8 type of the ids, uint64 sequences, uint64 documents + 1,
    int32 length of each sequence in tokens, int64 place of each sequence in bytes,
    int64 first sequence of each document, and the number of sequences

A document of one sequence counts in the loss. One of two sequences begins with a prompt, which does not count.
"""

import mmap
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from components.core.base.errors import DataError
from components.core.text.example import Documents, Example

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")
TYPES: dict[int, Any] = {4: np.int32, 8: np.uint16}
"""Types of ids that are written, by their code in Megatron."""
MAX_UINT16_VOCABULARY = 65500
"""Vocabularies below this size are stored as uint16, as Megatron does."""
RELEASE_BYTES = 16 << 20
"""Mapped pages are given back after so many bytes of tokens were read: the kernel maps up to 16 pages around each."""


class EncodedRows(NamedTuple):
    """Token ids of some documents, one after the other."""

    ids: NDArray[Any]
    lengths: NDArray[np.int32]
    """Tokens of each sequence."""
    sequences: NDArray[np.int64]
    """Sequences of each document: two where it has a prompt, else one."""


def id_type(vocab_size: int) -> Any:
    """Type of the ids of a vocabulary."""
    return np.uint16 if vocab_size < MAX_UINT16_VOCABULARY else np.int32


class TokenFileWriter:
    """Writes a token file; without its index, which is written at the end, nothing can be read."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path, self._type = path, id_type(vocab_size)
        self._lengths, self._sequences = bytearray(), bytearray()
        self._tokens: BinaryIO = _file(path, "bin").open("wb")
        self.largest_id = -1
        self.num_tokens = 0

    def add(self, rows: EncodedRows) -> None:
        """Append documents."""
        if len(rows.ids):
            self.largest_id = max(self.largest_id, int(rows.ids.max()))
            self._tokens.write(rows.ids.astype(self._type, copy=False).tobytes())
        self.num_tokens += len(rows.ids)
        self._lengths += rows.lengths.astype(np.int32, copy=False).tobytes()
        self._sequences += rows.sequences.astype(np.uint8).tobytes()

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return len(self._sequences)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Write the index, or remove the tokens where an error ended the writing."""
        self._tokens.close()
        if kind is not None:
            _file(self._path, "bin").unlink()
            return
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        places = _starts(lengths)[:-1] * np.dtype(self._type).itemsize
        documents = _starts(np.frombuffer(self._sequences, dtype=np.uint8))
        code = next(code for code, type_ in TYPES.items() if type_ is self._type)
        with _file(self._path, "idx").open("wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents)))
            for array in (lengths, places, documents):
                index.write(array.tobytes())


class TokenFile(Documents):
    """The documents of a token file."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Args:
            path: without `.bin` and `.idx`.

        Raises:
            DataError: no index of this layout, or one of documents with more than two sequences.
        """
        index = _map(_file(path, "idx"))
        magic, version, code, num_sequences, num_documents = HEADER.unpack_from(index)
        if (magic, version) != (MAGIC, VERSION) or code not in TYPES:
            raise DataError(f"{_file(path, 'idx')} is no index of token ids", hint="make it with the data stage")
        lengths = np.frombuffer(index, np.int32, num_sequences, HEADER.size)
        places = np.frombuffer(index, np.int64, num_sequences, HEADER.size + lengths.nbytes)
        documents = np.frombuffer(index, np.int64, num_documents, HEADER.size + lengths.nbytes + places.nbytes)
        sequences, first = np.diff(documents), documents[:-1]
        if len(sequences) and not 1 <= sequences.min() <= sequences.max() <= 2:
            raise DataError(f"{path} has documents that are not a text, or a prompt and its completion")
        type_ = np.dtype(TYPES[code])
        self.lengths = np.add.reduceat(lengths, first, dtype=np.int64) if len(first) else np.zeros(0, np.int64)
        self.prompts = np.where(sequences == 2, lengths[first], 0).astype(np.int64)
        self._first_tokens = places[first] // type_.itemsize
        self._pages = _map(_file(path, "bin"))
        self._tokens = np.frombuffer(self._pages, type_)
        self._read_bytes = 0

    def piece(self, document: int, start: int, stop: int) -> Example:
        """Tokens `start … stop - 1` of a document."""
        self._read_bytes += (stop - start) * self._tokens.itemsize
        if self._read_bytes > RELEASE_BYTES:
            self._pages.madvise(mmap.MADV_DONTNEED)
            self._read_bytes = 0
        first = int(self._first_tokens[document])
        return Example(self._tokens[first + start : first + stop], np.arange(start, stop) >= self.prompts[document])


def _file(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _starts(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Where each item begins whose sizes these are, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
