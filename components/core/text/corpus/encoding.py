"""Encodes a corpus into token files, and finds the token files of a corpus that a tokenizer has made already."""

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from components.core.base.config import digest_of
from components.core.base.errors import DataError
from components.core.text.corpus.parallel import map_rows
from components.core.text.corpus.token_file import EncodedRows, TokenFile, TokenFileWriter, id_type
from components.core.text.embedding_rows import embedding_rows, refuse_tokens_without_row
from components.core.text.example import Documents
from components.core.text.row_files import Row
from components.core.text.tokenizer import beginning_ids, token_id
from components.core.text.tokenizer_files import VOCABULARY, document_end, read_settings

TOKENS = "tokens.json"
"""In the folder of a corpus: which tokenizer its token files were made with, and what is in them."""


class CorpusEncoder:
    """Encodes rows: of `{"prompt", "completion"}` only the completion counts in the loss, of `{"text"}` all.

    Each document begins and ends as those of the model's pretraining, and none is truncated, whatever the tokenizer's
    file says.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / VOCABULARY))
        self.beginning = beginning_ids(self.tokenizer, read_settings(folder))
        self.end = token_id(self.tokenizer, document_end(folder), folder)
        self.vocab_size = int(self.tokenizer.get_vocab_size())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def __call__(self, rows: Sequence[Row]) -> EncodedRows:
        """Token ids of these rows."""
        type_ = id_type(self.vocab_size)
        beginning, end = np.array(self.beginning, type_), np.array([self.end], type_)
        texts: list[str] = []
        for row in rows:
            texts += [str(row["prompt"])] if row.get("prompt") else []
            texts.append(str(row["completion"] if "completion" in row else row["text"]))
        encodings = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        parts, lengths, sequences = [], [], []
        for row in rows:
            head = [beginning]
            if row.get("prompt"):
                head.append(np.array(next(encodings).ids, type_))
            tail = np.array(next(encodings).ids, type_)
            num_prompt, num_counted = sum(map(len, head)), len(tail) + 1
            parts += [*head, tail, end]
            # The first token of a document is never predicted, so a single token before the text needs no mark.
            two = num_prompt > min(1, len(self.beginning))
            lengths += [num_prompt, num_counted] if two else [num_prompt + num_counted]
            sequences.append(2 if two else 1)
        ids = np.concatenate(parts) if parts else np.zeros(0, type_)
        return EncodedRows(ids, np.array(lengths, np.int32), np.array(sequences, np.int64))


def encode_file(
    rows: Path,
    target: Path,
    tokenizer: Path,
    num_processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write the token file of a file of rows.

    Args:
        rows: JSON Lines that one of our stages wrote.
        target: without `.bin` and `.idx`.
        tokenizer: its folder.
        num_processes: processes that share the work; they change nothing in the result.
        progress: takes how many bytes are done, and how many there are.

    Returns:
        Documents, tokens and the largest id.
    """
    make = functools.partial(CorpusEncoder, tokenizer)
    with TokenFileWriter(target, make().vocab_size) as writer:
        for encoded in map_rows(rows, make, num_processes, progress):
            writer.add(encoded)
    return {"documents": writer.num_documents, "tokens": writer.num_tokens, "largest_id": writer.largest_id}


def encode_corpus(
    corpus: Path,
    tokenizer: Path,
    num_processes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Mapping[str, int]:
    """Write the token files of both splits of a corpus folder, for the model or the tokenizer of a folder.

    Returns:
        Tokens of each split that has rows.

    Raises:
        DataError: a text has a token that the embedding of the model has no row for.
    """
    found = {}
    for split in ("train", "validation"):
        rows = corpus / f"{split}.jsonl"
        if rows.is_file() and rows.stat().st_size:
            found[split] = encode_file(rows, corpus / split, tokenizer, num_processes, progress)
            _refuse_unknown_tokens(TokenFile(corpus / split), found[split]["largest_id"], tokenizer, f"corpus/{split}")
    record = {"encoding": encoding_digest(tokenizer), "splits": found}
    (corpus / TOKENS).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {split: counts["tokens"] for split, counts in found.items()}


def load_corpus(corpus: Path, tokenizer: Path, split: str) -> Documents:
    """The documents of one split of a corpus folder, as the model or the tokenizer of a folder reads them.

    Rows without a token file of this tokenizer are encoded into a temporary one.

    Raises:
        DataError: the split is empty, or has a token that the model of the tokenizer has no row for.
    """
    record = _record(corpus)
    counts = record["splits"].get(split) if record.get("encoding") == encoding_digest(tokenizer) else None
    if counts is not None:
        documents = TokenFile(corpus / split)
    else:
        rows = corpus / f"{split}.jsonl"
        if not rows.is_file() or not rows.stat().st_size:
            raise DataError(f"the {split} split of the corpus has no rows", hint="give the data stage more text")
        with tempfile.TemporaryDirectory(prefix="tessera-tokens-") as folder:
            counts = encode_file(rows, Path(folder) / split, tokenizer)
            documents = TokenFile(Path(folder) / split)  # the mapping outlives the file
    _refuse_unknown_tokens(documents, counts["largest_id"], tokenizer, f"the {split} corpus")
    return documents


def encoding_digest(tokenizer: Path) -> str:
    """Names the way in which a tokenizer folder encodes a corpus: its vocabulary, and how documents begin and end."""
    settings = read_settings(tokenizer)
    first = beginning_ids(Tokenizer.from_file(str(tokenizer / VOCABULARY)), settings)
    with (tokenizer / VOCABULARY).open("rb") as vocabulary:
        return digest_of([hashlib.file_digest(vocabulary, "sha256").hexdigest(), first, document_end(tokenizer)])


def _record(corpus: Path) -> dict[str, Any]:
    file = corpus / TOKENS
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return record


def _refuse_unknown_tokens(documents: Documents, largest_id: int, folder: Path, place: str) -> None:
    rows = embedding_rows(folder)
    if rows is not None and largest_id >= rows:
        refuse_tokens_without_row((list(map(int, document.token_ids)) for document in documents), folder, place)
