"""Packs tokenized documents into batches: a deterministic stream, addressed by the global count of samples.

Shape letters: B rows of a batch, T tokens of a row.
"""

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from components.core.base.errors import DataError
from components.core.text.embedding_rows import refuse_tokens_without_row
from components.core.text.example import Example
from components.core.text.tokenizer import beginning_ids
from components.core.text.tokenizer_files import document_end, end_token, read_settings

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


def encode_corpus(
    rows: Iterable[dict[str, object]], tokenizer: Tokenizer, end: int, beginning: Sequence[int] = ()
) -> list[Example]:
    """Tokenize corpus rows. Of `{"prompt", "completion"}` only the completion counts in the loss, of `{"text"}` all.

    Args:
        rows: of a corpus.
        tokenizer: the model's.
        end: the token behind each document.
        beginning: the tokens before each document.
    """
    prompts, completions = [], []
    for row in rows:
        prompts.append(str(row.get("prompt", "")))
        completions.append(str(row["completion"] if "completion" in row else row["text"]))
    heads = tokenizer.encode_batch(prompts, add_special_tokens=False)
    tails = tokenizer.encode_batch(completions, add_special_tokens=False)
    examples = []
    for head, tail in zip(heads, tails, strict=True):
        before = [*beginning, *head.ids]
        examples.append(Example([*before, *tail.ids, end], [False] * len(before) + [True] * (len(tail.ids) + 1)))
    return examples


def load_corpus(corpus: Path, tokenizer_folder: Path, split: str) -> list[Example]:
    """Examples of one split of a corpus folder.

    Raises:
        DataError: the split is empty, or has a token that the model of the tokenizer has no row for.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    examples = encode_corpus(
        read_rows(corpus / f"{split}.jsonl"),
        tokenizer,
        token_id(tokenizer, document_end(tokenizer_folder), tokenizer_folder),
        beginning_ids(tokenizer, read_settings(tokenizer_folder)),
    )
    if not examples:
        raise DataError(f"the {split} split of the corpus has no rows", hint="give the data stage more text")
    refuse_tokens_without_row((example.token_ids for example in examples), tokenizer_folder, f"the {split} corpus")
    return examples


def eos_token_id(folder: Path) -> int:
    """The id of the end-of-sequence token of a tokenizer folder."""
    return token_id(Tokenizer.from_file(str(folder / "tokenizer.json")), end_token(folder), folder)


def token_id(tokenizer: Tokenizer, token: str, folder: Path) -> int:
    """The id of a token of a tokenizer folder.

    Raises:
        DataError: the vocabulary lacks it.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise DataError(f"the token {token!r} is not in the vocabulary of {folder.name}")
    return int(found)


@dataclass(frozen=True)
class PackedStream:
    """Packed rows of endless epochs over `examples`; row k is the same on every rank and in every run.

    Attributes:
        examples: documents; longer than `seq_len` are cut into pieces.
        seq_len: tokens of a row.
        seed: shuffles every epoch anew.
        pad: token id that fills the end of a row.
    """

    examples: Sequence[Example]
    seq_len: int
    seed: int
    pad: int = 0

    @cached_property
    def _pieces(self) -> list[Example]:
        """The examples, none longer than a row."""
        pieces = []
        for example in self.examples:
            for start in range(0, len(example.token_ids), self.seq_len):
                stop = start + self.seq_len
                piece = Example(example.token_ids[start:stop], example.counts[start:stop])
                if len(piece.token_ids) > 1 and any(piece.counts[1:]):
                    pieces.append(piece)
        if not pieces:
            raise DataError("no example has a token to learn from", hint="see the data stage's corpus")
        return pieces

    @cached_property
    def _epochs(self) -> list[list[list[int]]]:
        """Rows (lists of piece numbers) of the epochs packed so far."""
        return []

    def _row(self, index: int) -> list[int]:
        """Piece numbers of global row `index`."""
        epoch = 0
        while True:
            if epoch == len(self._epochs):
                self._epochs.append(self._pack_epoch(epoch))
            rows = self._epochs[epoch]
            if index < len(rows):
                return rows[index]
            index -= len(rows)
            epoch += 1

    @property
    def num_rows(self) -> int:
        """Rows of the first epoch, in which every example is once."""
        self._row(0)
        return len(self._epochs[0])

    def _pack_epoch(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._pieces))
        rows: list[list[int]] = []
        for start in range(0, len(order), PACKING_WINDOW):
            window = order[start : start + PACKING_WINDOW]
            lengths = [len(self._pieces[i].token_ids) for i in window]
            packed = best_fit_decreasing(lengths, self.seq_len)
            shuffle = np.random.default_rng([self.seed, epoch, start]).permutation(len(packed))
            rows += [[int(window[i]) for i in packed[bin_index]] for bin_index in shuffle]
        return rows

    def batch(self, first: int, num_rows: int) -> Batch:
        """Rows `first … first + num_rows - 1` of the stream."""
        return pack_rows(
            [[self._pieces[i] for i in self._row(first + k)] for k in range(num_rows)], self.seq_len, self.pad
        )


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


def load_batches(
    corpus: Path, tokenizer_folder: Path, split: str, *, seq_len: int, batch_size: int, limit: int, seed: int = 0
) -> list[Batch]:
    """The first `limit` packed batches of one split of a corpus, for calibration and held-out measurements.

    No row comes twice: where the split has fewer rows, there are fewer batches. The last one may be smaller then,
    because every row of a small split counts, and means are over tokens, whatever the batches.

    Raises:
        DataError: the split is empty, or has no token to learn from.
    """
    stream = PackedStream(load_corpus(corpus, tokenizer_folder, split), seq_len, seed)
    num_rows = min(limit * batch_size, stream.num_rows)
    return [stream.batch(first, min(batch_size, num_rows - first)) for first in range(0, num_rows, batch_size)]
