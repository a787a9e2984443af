"""Counts the held-out problems whose question stands in the corpus that is trained on.

A question counts where at least 70 % of its sequences of eight words are in the corpus, in whichever documents.
Source: arXiv 2204.02311, section 8. Shorter questions are not counted; as prompts of a corpus they are held out.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from components.core.text.corpus.parallel import map_rows
from components.core.text.row_files import Row

NUM_WORDS, FRACTION = 8, 0.7
WORD = re.compile(r"\w+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that multiplication permutes the 64-bit numbers."""
FILTER_BITS = 20
"""Most sequences of a corpus are ruled out by so many bits of their hash."""


@dataclass(frozen=True)
class Overlap:
    """Held-out problems whose question is in the corpus.

    Attributes:
        problems: their numbers.
        documents: for each, the first document with a sequence of its words.
        num_compared: problems whose question is long enough.
    """

    problems: Sequence[int]
    documents: Sequence[int]
    num_compared: int


def find_overlap(questions: Sequence[str], corpus: Path, num_processes: int) -> Overlap:
    """Look for the questions in the rows of a corpus file.

    Args:
        questions: of the held-out problems.
        corpus: JSON Lines with rows {text} or {prompt, completion}.
        num_processes: processes that share the work.
    """
    _, owners = _sequences(questions)
    first_document = np.full(len(owners), -1, dtype=np.int64)
    num_documents = 0
    if len(owners):
        for found, documents, count in map_rows(corpus, functools.partial(_Search, questions), num_processes):
            new = first_document[found] < 0
            first_document[found[new]] = documents[new] + num_documents
            num_documents += count
    total = np.bincount(owners, minlength=len(questions))
    found_in = np.bincount(owners[first_document >= 0], minlength=len(questions))
    problems = np.flatnonzero((total > 0) & (found_in >= FRACTION * total)).tolist()
    firsts = [int(first_document[(owners == problem) & (first_document >= 0)].min()) for problem in problems]
    return Overlap(problems, firsts, int((total > 0).sum()))


class _Search:
    """Finds the sequences of words of some questions in rows."""

    def __init__(self, questions: Sequence[str]) -> None:
        hashes, _ = _sequences(questions)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self._filter = np.zeros(1 << FILTER_BITS, dtype=np.bool_)
        self._filter[_filter_bits(hashes)] = True

    def __call__(self, rows: Sequence[Row]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Sequences that are in these rows, the first row of each, and how many rows there are."""
        hashes, documents = _sequences([_text(row) for row in rows])
        likely = np.flatnonzero(self._filter[_filter_bits(hashes)])
        hashes, documents = hashes[likely], documents[likely]
        starts = np.searchsorted(self._sorted, hashes, "left")
        stops = np.searchsorted(self._sorted, hashes, "right")
        first: dict[int, int] = {}
        for start, stop, document in zip(starts.tolist(), stops.tolist(), documents.tolist(), strict=True):
            for place in range(start, stop):
                first.setdefault(int(self._order[place]), document)
        return np.array(list(first), np.int64), np.array(list(first.values()), np.int64), len(rows)


def _sequences(texts: Iterable[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hash of each sequence of words, and the number of the text that it is from.

    Words are hashed as Python does, with a seed of the process: hashes of two processes do not match.
    """
    hashes: list[int] = []
    lengths = []
    for text in texts:
        words = WORD.findall(text.casefold())
        hashes += map(hash, words)
        lengths.append(len(words))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    if len(owner) < NUM_WORDS:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    words_hash = np.array(hashes, dtype=np.int64).view(np.uint64)
    count = len(owner) - NUM_WORDS + 1
    sequence = np.zeros(count, dtype=np.uint64)
    for offset in range(NUM_WORDS):
        sequence = sequence * MULTIPLIER + words_hash[offset : offset + count]
    whole = owner[:count] == owner[NUM_WORDS - 1 :]
    return sequence[whole], owner[:count][whole]


def _filter_bits(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)


def _text(row: Row) -> str:
    return " ".join(str(row[key]) for key in ("prompt", "completion", "text") if key in row)
