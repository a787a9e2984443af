"""Tokenized documents. Imports no torch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Example:
    """One document, or a piece of one: its tokens, and which of them count in the loss."""

    token_ids: Sequence[int] | NDArray[Any]
    counts: Sequence[bool] | NDArray[np.bool_]
    """True where predicting this token counts."""


class Documents(ABC):
    """Tokenized documents, addressed by number."""

    lengths: NDArray[np.int64]
    """Tokens of each document."""
    prompts: NDArray[np.int64]
    """Tokens at the beginning of each document that do not count in the loss."""

    @abstractmethod
    def piece(self, document: int, start: int, stop: int) -> Example:
        """Tokens `start … stop - 1` of a document."""

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.lengths)

    def __getitem__(self, document: int) -> Example:
        """A whole document."""
        return self.piece(document, 0, int(self.lengths[document]))

    def __iter__(self) -> Iterator[Example]:
        """All documents in order."""
        return (self[document] for document in range(len(self)))


class DocumentList(Documents):
    """Documents in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self.lengths = np.array([len(example.token_ids) for example in examples], dtype=np.int64)
        firsts = (np.flatnonzero(example.counts) for example in examples)
        counted = zip(firsts, self.lengths, strict=True)
        self.prompts = np.array([first[0] if len(first) else length for first, length in counted], dtype=np.int64)

    def piece(self, document: int, start: int, stop: int) -> Example:
        """Tokens `start … stop - 1` of a document."""
        example = self._examples[document]
        return Example(example.token_ids[start:stop], example.counts[start:stop])


class DocumentRange(Documents):
    """Some of the documents, one after the other."""

    def __init__(self, documents: Documents, start: int, stop: int) -> None:
        self._documents, self._start = documents, start
        self.lengths, self.prompts = documents.lengths[start:stop], documents.prompts[start:stop]

    def piece(self, document: int, start: int, stop: int) -> Example:
        """Tokens `start … stop - 1` of a document."""
        return self._documents.piece(self._start + document, start, stop)
