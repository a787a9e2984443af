"""Writes a user's corpus, which need not fit into memory: rows by split, without near duplicates on both sides."""

from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from components.core.base.errors import DataError
from components.core.runtime.context import StageContext
from components.core.text.corpus.parallel import map_rows
from components.core.text.corpus.parts import write_parts
from components.core.text.jsonl import write_rows
from components.core.text.row_files import Row
from components.data.own_files import CorpusReader, count_parts
from components.data.splits import question_digest

RANK_BYTES = 8
"""Bytes of a hash that stand for a row; of ten million rows, two share them in one of 370,000 corpora."""


def write_corpus(
    reader: CorpusReader,
    out: Path,
    weights: Sequence[float],
    fraction: float,
    held_out: Set[bytes],
    context: StageContext,
) -> dict[str, int]:
    """Write `train.jsonl` and `validation.jsonl`, and how the documents are blended where there are weights.

    Args:
        reader: reads the rows.
        out: folder of the corpus.
        weights: of the user's corpora; none: they are one.
        fraction: of the distinct rows, held out for validation.
        held_out: hashes of questions that must not be in training: those of held-out problems.
        context: gives scratch space and processes.

    Returns:
        Rows of each split.

    Raises:
        DataError: malformed lines, no text, or not one weight for each corpus.
    """
    rows = context.scratch / "corpus.jsonl"
    counts = [
        write_rows(rows, reader.rows(part), append=number > 0) for number, part in enumerate(_parts(reader, weights))
    ]
    digests = np.concatenate(list(map_rows(rows, _Digests, context.placement.threads)))
    is_held_out = _choose_held_out(digests, fraction, held_out)
    _write_splits(rows, out, is_held_out)
    rows.unlink()
    if weights:
        validation = [int(part.sum()) for part in np.split(is_held_out, np.cumsum(counts)[:-1])]
        train = [count - less for count, less in zip(counts, validation, strict=True)]
        write_parts(out, weights, {"train": train, "validation": validation})
    num_validation = int(is_held_out.sum())
    return {"train": len(is_held_out) - num_validation, "validation": num_validation}


def _parts(reader: CorpusReader, weights: Sequence[float]) -> Sequence[int | None]:
    """Numbers of the user's corpora; None for all of them as one.

    Raises:
        DataError: there are more or fewer weights than corpora.
    """
    if not weights:
        return [None]
    if (num_corpora := count_parts(reader.folder)) != len(weights):
        raise DataError(
            f"data.corpus_weights has {len(weights)} weights, and the recipe names {num_corpora} corpora",
            hint="give one weight for each path of `corpus`, in the same order",
        )
    return range(len(weights))


def _rank(digest: bytes) -> int:
    return int.from_bytes(digest[:RANK_BYTES])


class _Digests:
    """Hashes of rows, by their prompt or their text, as numbers."""

    def __call__(self, rows: Sequence[Row]) -> NDArray[np.uint64]:
        texts = (str(row["prompt"] if "prompt" in row else row["text"]) for row in rows)
        return np.array([_rank(question_digest(text)) for text in texts], dtype=np.uint64)


def _choose_held_out(digests: NDArray[np.uint64], fraction: float, held_out: Set[bytes]) -> NDArray[np.bool_]:
    """Which rows are held out: those with a hash in `held_out`, and a fraction of the others by their hash.

    Where there are two or more distinct others, at least one is held out, and not all.
    """
    excluded = np.isin(digests, np.array([_rank(digest) for digest in held_out], dtype=np.uint64))
    distinct = np.unique(digests[~excluded])
    count = int(np.searchsorted(distinct, np.uint64(int(fraction * 2**64))))
    chosen = distinct[: max(0, min(max(1, count), len(distinct) - 1))]
    return excluded | np.isin(digests, chosen)


def _write_splits(rows: Path, out: Path, is_held_out: NDArray[np.bool_]) -> None:
    """Copy each row to the file of its split."""
    with (
        rows.open("rb") as lines,
        (out / "train.jsonl").open("wb") as train,
        (out / "validation.jsonl").open("wb") as validation,
    ):
        for line, held in zip(lines, is_held_out.tolist(), strict=True):
            (validation if held else train).write(line)
