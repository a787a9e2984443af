"""Packs tokenized documents into batches: a deterministic stream, addressed by the global count of samples.

A sample is a packed row. Which documents are in it is an index, computed once for each epoch.

Shape letters: B rows of a batch, T tokens of a row.
"""

import bisect
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.core.base.errors import DataError
from components.core.text.corpus.blend import Blend
from components.core.text.corpus.encoding import load_corpus
from components.core.text.corpus.parts import corpus_parts
from components.core.text.corpus.stored_arrays import Arrays, stored_arrays
from components.core.text.example import DocumentRange, Documents, Example

IGNORE = -100
"""Label of a position that does not count in the loss; the value is PyTorch's default."""

PACKING_WINDOW = 4096
"""Examples that are packed together: enough to fill rows to over 99 %, few enough to pack while training runs."""


@dataclass(frozen=True)
class Batch:
    """Packed rows. Labels are already shifted: `labels[b, t]` is what position t should predict."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    """Number of the document within the row, from 1; 0 is padding."""

    @property
    def num_targets(self) -> int:
        """Positions that count in the loss."""
        return int((self.labels_BT != IGNORE).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens, without padding."""
        return int((self.segment_ids_BT > 0).sum())

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and one of its document that it attends to, itself included."""
        return int((self.position_ids_BT + 1)[self.segment_ids_BT > 0].sum())

    def rows(self, start: int, stop: int, step: int = 1) -> "Batch":
        """The batch of some of the rows."""
        part = slice(start, stop, step)
        return Batch(
            self.input_ids_BT[part], self.labels_BT[part], self.position_ids_BT[part], self.segment_ids_BT[part]
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(
            self.input_ids_BT.to(device),
            self.labels_BT.to(device),
            self.position_ids_BT.to(device),
            self.segment_ids_BT.to(device),
        )


def read_rows(path: Path) -> Iterator[dict[str, object]]:
    """Rows of a JSONL file that one of our stages wrote."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


class RowStream(ABC):
    """Endless packed rows; row k is the same on every rank and in every run."""

    seq_len: int
    """Tokens of a row."""
    seed: int
    """Shuffles every epoch anew."""
    pad: int
    """Token id that fills the end of a row."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows before an example comes a second time."""

    @abstractmethod
    def row(self, index: int) -> list[Example]:
        """The examples of one row."""

    def rows(self, indices: Sequence[int]) -> Batch:
        """The batch of some rows of the stream; no others are read."""
        return pack_rows([self.row(index) for index in indices], self.seq_len, self.pad)

    def batch(self, first: int, num_rows: int) -> Batch:
        """Rows `first … first + num_rows - 1` of the stream."""
        return self.rows(range(first, first + num_rows))


@dataclass(frozen=True)
class PackedStream(RowStream):
    """Packed rows of endless epochs over documents.

    Attributes:
        documents: longer than `seq_len` are cut into pieces.
        seq_len: tokens of a row.
        seed: shuffles every epoch anew.
        pad: token id that fills the end of a row.
        folder: where the index of each epoch is stored, for all processes that read these documents in rows of this
            length with this seed; None: in memory.
    """

    documents: Documents
    seq_len: int
    seed: int
    pad: int = 0
    folder: Path | None = None

    @cached_property
    def _pieces(self) -> NDArray[np.int64]:
        """Document, start and stop of each piece that a row can have."""
        (pieces,) = stored_arrays(self.folder, "pieces", lambda: (_cut(self.documents, self.seq_len),))
        return pieces

    @cached_property
    def _epochs(self) -> list[Arrays]:
        """Indexes of the epochs so far."""
        return []

    def _epoch(self, number: int) -> Arrays:
        """Pieces in the order of the rows of an epoch, and where each row begins among them."""
        while number >= len(self._epochs):
            epoch = len(self._epochs)
            self._epochs.append(stored_arrays(self.folder, f"epoch-{epoch}", partial(self._pack_epoch, epoch)))
        return self._epochs[number]

    def _pack_epoch(self, epoch: int) -> Arrays:
        pieces = self._pieces
        lengths = pieces[:, 2] - pieces[:, 1]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(pieces))
        packed, sizes = [], []
        for start in range(0, len(order), PACKING_WINDOW):
            window = order[start : start + PACKING_WINDOW]
            bins = best_fit_decreasing(lengths[window].tolist(), self.seq_len)
            shuffle = np.random.default_rng([self.seed, epoch, start]).permutation(len(bins))
            packed.append(window[list(itertools.chain.from_iterable(bins[number] for number in shuffle))])
            sizes.append([len(bins[number]) for number in shuffle])
        return np.concatenate(packed), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])

    @property
    def num_rows(self) -> int:
        """Rows of the first epoch, in which every example is once."""
        return len(self._epoch(0)[1]) - 1

    def row(self, index: int) -> list[Example]:
        """The examples of one row."""
        epoch = 0
        while index >= (num_rows := len(self._epoch(epoch)[1]) - 1):
            index, epoch = index - num_rows, epoch + 1
        order, starts = self._epoch(epoch)
        pieces = self._pieces[order[starts[index] : starts[index + 1]]].tolist()
        return [self.documents.piece(document, start, stop) for document, start, stop in pieces]


@dataclass(frozen=True)
class BlendedStream(RowStream):
    """Rows of several streams, interleaved by weight.

    Attributes:
        streams: one for each corpus, with rows of the same length.
        blend: says which stream each row is from.
        seq_len: tokens of a row.
        seed: shuffles every epoch of each stream anew.
        pad: token id that fills the end of a row.
    """

    streams: Sequence[RowStream]
    blend: Blend
    seq_len: int
    seed: int
    pad: int = 0

    @property
    def num_rows(self) -> int:
        """Rows before an example comes a second time."""
        return self.blend.longest([stream.num_rows for stream in self.streams])

    def row(self, index: int) -> list[Example]:
        """The examples of one row."""
        stream, own = self.blend.locate(index)
        return self.streams[stream].row(own)


def _cut(documents: Documents, seq_len: int) -> NDArray[np.int64]:
    """Document, start and stop of each piece of at most `seq_len` tokens that has a token to learn from.

    Raises:
        DataError: there is none.
    """
    counts = -(-documents.lengths // seq_len)
    document = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document)) - first) * seq_len
    stop = np.minimum(start + seq_len, documents.lengths[document])
    useful = stop > np.maximum(start + 1, documents.prompts[document])
    if not useful.any():
        raise DataError("no example has a token to learn from", hint="see the data stage's corpus")
    pieces: NDArray[np.int64] = np.stack([document, start, stop], axis=1)[useful]
    return pieces


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins of `capacity`: longest first, each into the fullest bin that it fits.

    Returns:
        Item numbers of each bin. Bins are sorted by their free space, so the time is O(n log n).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free space, bin number), sorted
    for item in order:
        place = bisect.bisect_left(free, (lengths[item], -1))
        if place == len(free):
            bins.append([item])
            bisect.insort(free, (capacity - lengths[item], len(bins) - 1))
        else:
            space, number = free.pop(place)
            bins[number].append(item)
            bisect.insort(free, (space - lengths[item], number))
    return bins


def pack_rows(rows: Sequence[Sequence[Example]], seq_len: int, pad: int) -> Batch:
    """Concatenate the examples of each row; each is a segment of its own, with positions from 0."""
    shape = (len(rows), seq_len)
    input_ids: NDArray[np.int64] = np.full(shape, pad, dtype=np.int64)
    labels: NDArray[np.int64] = np.full(shape, IGNORE, dtype=np.int64)
    positions: NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
    segments: NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            stop = start + len(example.token_ids)
            ids = np.asarray(example.token_ids, dtype=np.int64)
            input_ids[b, start:stop] = ids
            labels[b, start : stop - 1] = np.where(np.asarray(example.counts)[1:], ids[1:], IGNORE)
            positions[b, start:stop] = np.arange(stop - start)
            segments[b, start:stop] = segment
            start = stop
    return Batch(*(torch.from_numpy(array) for array in (input_ids, labels, positions, segments)))


def corpus_stream(
    corpus: Path, tokenizer_folder: Path, split: str, *, seq_len: int, seed: int, folder: Path | None = None
) -> RowStream:
    """Packed rows of one split of a corpus folder, blended where the corpus has weights.

    Args:
        corpus: as the data stage writes it.
        tokenizer_folder: a model, or a tokenizer.
        split: train or validation.
        seq_len: tokens of a row.
        seed: shuffles every epoch anew.
        folder: where the packing is stored, shared by the ranks of a machine; None: in memory.

    Raises:
        DataError: the split is empty, or has a token that the model of the tokenizer has no row for.
    """
    documents = load_corpus(corpus, tokenizer_folder, split)
    weights, parts = corpus_parts(corpus, split, len(documents))
    streams = [
        PackedStream(
            DocumentRange(documents, part.start, part.stop),
            seq_len,
            seed,
            folder=folder and folder / f"{split}-{number}-{seq_len}-{seed}",
        )
        for number, part in enumerate(parts)
    ]
    return streams[0] if len(streams) == 1 else BlendedStream(streams, Blend(weights), seq_len, seed)


def load_batches(
    corpus: Path, tokenizer_folder: Path, split: str, *, seq_len: int, batch_size: int, limit: int, seed: int = 0
) -> list[Batch]:
    """The first `limit` packed batches of one split of a corpus, for calibration and held-out measurements.

    No row comes twice: where the split has fewer rows, there are fewer batches. The last one may be smaller then,
    because every row of a small split counts, and means are over tokens, whatever the batches.

    Raises:
        DataError: the split is empty, or has no token to learn from.
    """
    stream = corpus_stream(corpus, tokenizer_folder, split, seq_len=seq_len, seed=seed)
    num_rows = min(limit * batch_size, stream.num_rows)
    return [stream.batch(first, min(batch_size, num_rows - first)) for first in range(0, num_rows, batch_size)]
