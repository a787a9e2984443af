"""Looks at a user's data before a run: how much there is, and how long it is in tokens of the parent's tokenizer."""

import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from components.core.text.chat import encode_chats, prompt_ids
from components.core.text.corpus.encoding import CorpusEncoder
from components.core.text.row_files import Row
from components.core.text.tokenizer import add_toggle
from components.data.data_facts import ChatFacts, CorpusFacts, DataFacts, ProblemFacts
from components.data.own_files import CorpusReader, chat_rows, problem_rows

SURVEYED_BYTES = 64 << 20
"""Text of a corpus that is read; the rest is taken to be like it."""
MAX_ENCODED = 5_000
"""Most documents, chats or questions that are encoded, evenly spread over those that were read."""
PERCENTILE = 99
SMOKE_PERCENTILE = 25
"""Length of the question for the smoke test among all questions: short, but not the shortest."""


def survey(parent: Path, corpus: Path | None, chats: Path | None, problems: Path | None) -> DataFacts:
    """Read the data as the data stage does, and encode it with the parent's tokenizer.

    Args:
        parent: the model folder.
        corpus: folder of text; None where there is none.
        chats: folder of chats; likewise.
        problems: folder of problems; likewise.

    Raises:
        DataError: malformed rows, or no row at all.
        CheckpointError: the tokenizer cannot be given the toggle.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
        tokenizer = Path(folder)
        add_toggle(parent, tokenizer)
        return DataFacts(
            corpus=None if corpus is None else _corpus_facts(corpus, parent),
            chats=None if chats is None else _chat_facts(chats, tokenizer),
            problems=None if problems is None else _problem_facts(problems, tokenizer),
        )


def _corpus_facts(folder: Path, parent: Path) -> CorpusFacts:
    """Tokens of all documents, from those of some of the first ones."""
    rows: list[Row] = []
    read_bytes, whole = 0, True
    for row in CorpusReader(folder, skip_bad=False).rows():
        rows.append(row)
        read_bytes += _text_bytes(row)
        if read_bytes >= SURVEYED_BYTES:
            whole = False
            break
    sample = evenly(rows, MAX_ENCODED)
    encode = CorpusEncoder(parent)
    lengths = [int(encode([row]).lengths.sum()) for row in sample]
    all_bytes = read_bytes
    if not whole:
        all_bytes = max(read_bytes, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    tokens_a_byte = sum(lengths) / sum(map(_text_bytes, sample))
    estimated = not whole or len(sample) < len(rows)
    return CorpusFacts(
        tokens=round(tokens_a_byte * all_bytes), estimated=estimated, document_tokens=percentile(lengths)
    )


def _chat_facts(folder: Path, tokenizer: Path) -> ChatFacts:
    rows, _ = chat_rows(folder, skip_bad=False)
    sample = evenly(rows, MAX_ENCODED)
    examples = encode_chats(sample, tokenizer)
    lengths = [len(example.token_ids) for example in examples]
    return ChatFacts(
        num_chats=len(rows),
        num_thinking=sum(row["reasoning"] == "on" for row in rows),
        tokens=round(sum(lengths) * len(rows) / len(sample)),
        chat_tokens=percentile(lengths),
        longest_chat=max(lengths),
        answer_tokens=percentile([sum(example.counts) for example in examples]),
    )


def _problem_facts(folder: Path, tokenizer: Path) -> ProblemFacts:
    rows, _ = problem_rows(folder, skip_bad=False)
    questions = [str(row["question"]) for row in evenly(rows, MAX_ENCODED)]
    lengths = [len(ids) for ids in prompt_ids(tokenizer, questions, "on")]
    by_length = sorted(zip(lengths, questions, strict=True))
    return ProblemFacts(
        num_problems=len(rows),
        prompt_tokens=percentile(lengths),
        question=by_length[len(by_length) * SMOKE_PERCENTILE // 100][1],
    )


def evenly(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many of the rows, evenly spread."""
    step = -(-len(rows) // most) or 1
    return list(islice(rows, 0, None, step))


def percentile(lengths: Sequence[int]) -> int:
    """The length that 99 % of these do not exceed; one of them."""
    return int(np.percentile(lengths, PERCENTILE, method="inverted_cdf"))


def _text_bytes(row: Row) -> int:
    return sum(len(str(row[key]).encode()) for key in ("text", "prompt", "completion") if key in row)
