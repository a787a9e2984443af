"""Token files, read by the layout that Megatron-Core documents for its `IndexedDataset`, and by our own reader."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.base.errors import DataError
from components.core.text.corpus import token_file
from components.core.text.corpus.token_file import EncodedRows, TokenFile, TokenFileWriter

TEXTS = st.lists(st.tuples(st.lists(st.integers(0, 299), max_size=5), st.lists(st.integers(0, 299), min_size=1)))
"""Prompt and text of each document; without a prompt it has one sequence."""


def encoded(documents: list[tuple[list[int], list[int]]]) -> EncodedRows:
    ids = [token for prompt, text in documents for token in (*prompt, *text)]
    lengths = [len(part) for prompt, text in documents for part in ((prompt, text) if prompt else (text,))]
    return EncodedRows(
        np.array(ids, np.int32), np.array(lengths, np.int32), np.array([2 if p else 1 for p, _ in documents], np.int64)
    )


def write(path: Path, documents: list[tuple[list[int], list[int]]], vocab_size: int = 300) -> Path:
    with TokenFileWriter(path, vocab_size) as writer:
        for half in (documents[: len(documents) // 2], documents[len(documents) // 2 :]):
            writer.add(encoded(half))
    return path


def published_layout(path: Path) -> list[list[list[int]]]:
    """Sequences of each document, read as Megatron-Core does it."""
    index = path.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack("<QBQQ", index[9:34])
    assert version == 1
    type_ = {4: np.int32, 8: np.uint16}[code]
    lengths = np.frombuffer(index, np.int32, sequences, 34)
    pointers = np.frombuffer(index, np.int64, sequences, 34 + 4 * sequences)
    first = np.frombuffer(index, np.int64, documents, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents
    content = path.with_suffix(".bin").read_bytes()
    read = [np.frombuffer(content, type_, n, at).tolist() for n, at in zip(lengths, pointers, strict=True)]
    return [read[start:stop] for start, stop in itertools.pairwise(first)]


@given(documents=TEXTS.filter(bool))
def test_what_was_written_is_read_by_megatrons_layout_and_by_ours(
    documents: list[tuple[list[int], list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("tokens") / "train", documents)
    assert published_layout(path) == [[prompt, text] if prompt else [text] for prompt, text in documents]

    ours = TokenFile(path)
    assert [list(example.token_ids) for example in ours] == [[*prompt, *text] for prompt, text in documents]
    assert ours.prompts.tolist() == [len(prompt) for prompt, _ in documents]
    for example, (prompt, text) in zip(ours, documents, strict=True):
        assert list(example.counts) == [False] * len(prompt) + [True] * len(text)


@pytest.mark.parametrize(("vocab_size", "size"), [(65499, 2), (65500, 4), (200_000, 4)])
def test_ids_take_the_fewest_bytes_that_megatron_takes(tmp_path: Path, vocab_size: int, size: int) -> None:
    path = write(tmp_path / "train", [([], [1, vocab_size - 1, 3])], vocab_size)
    assert path.with_suffix(".bin").stat().st_size == 3 * size
    assert list(TokenFile(path)[0].token_ids) == [1, vocab_size - 1, 3]


def test_a_piece_is_a_part_of_one_document(tmp_path: Path) -> None:
    ours = TokenFile(write(tmp_path / "train", [([], [1, 2]), ([3, 4], [5, 6, 7])]))
    piece = ours.piece(1, 1, 4)
    assert (list(piece.token_ids), list(piece.counts)) == ([4, 5, 6], [False, True, True])


def test_pages_are_given_back_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "RELEASE_BYTES", 4)
    documents: list[tuple[list[int], list[int]]] = [([], list(range(n, n + 9))) for n in range(50)]
    ours = TokenFile(write(tmp_path / "train", documents))
    earlier = ours[0]
    assert [list(example.token_ids) for example in ours] == [text for _, text in documents]
    assert list(earlier.token_ids) == documents[0][1]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AttributeError), TokenFileWriter(tmp_path / "train", 300) as writer:
        writer.add(encoded([([], [1, 2])])._replace(lengths=None))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train", [([], [1, 2])])
    path.with_suffix(".idx").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match="is no index of token ids"):
        TokenFile(path)
