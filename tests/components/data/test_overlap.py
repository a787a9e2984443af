"""Held-out problems whose question stands in the corpus."""

import json
from pathlib import Path

import pytest

from components.core.text.corpus import parallel
from components.data.overlap import find_overlap

WORDS = [f"word{number}" for number in range(400)]
ASKED = " ".join(WORDS[:30])
"""Has 23 sequences of eight words."""


def corpus(folder: Path, *texts: str) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ([f"so: {ASKED.upper()}?"], True),
        ([ASKED.replace(" ", ",\n")], True),
        ([" ".join(WORDS[:24])], True),  # 17 of 23: 74 %
        ([" ".join(WORDS[:23])], False),  # 16 of 23: 70 % less one half
        ([" ".join(WORDS[:19]), "other", " ".join(WORDS[12:30])], True),  # in two documents
        ([" ".join(WORDS[:15]), " ".join(WORDS[15:30])], False),  # no sequence over two documents
        ([" ".join(WORDS[100:])], False),
        (["short"], False),
    ],
)
def test_a_question_counts_where_seventy_percent_of_its_sequences_are_there(
    tmp_path: Path, texts: list[str], found: bool
) -> None:
    overlap = find_overlap(["7+5=", ASKED, " ".join(WORDS[200:220])], corpus(tmp_path, "a", *texts), 1)
    assert overlap.problems == ([1] if found else []) + ([2] if texts == [" ".join(WORDS[100:])] else [])
    assert overlap.num_compared == 2
    assert list(overlap.documents) == [1] * len(overlap.problems)


def test_processes_find_the_same_and_documents_are_counted_over_all_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(WORDS[100 + number : 140 + number]) for number in range(50)]
    path = corpus(tmp_path, *texts, ASKED, *texts, ASKED)
    monkeypatch.setattr(parallel, "CHUNK_BYTES", 700)
    alone = find_overlap([ASKED, ASKED], path, 1)
    monkeypatch.setattr(parallel, "MIN_PARALLEL_BYTES", 0)
    assert find_overlap([ASKED, ASKED], path, 2) == alone
    assert (list(alone.problems), list(alone.documents)) == ([0, 1], [50, 50])


def test_without_long_questions_nothing_is_read(tmp_path: Path) -> None:
    overlap = find_overlap(["7+5=", ""], tmp_path / "no-file", 1)
    assert (overlap.problems, overlap.num_compared) == ([], 0)
    assert find_overlap([], tmp_path / "no-file", 1).num_compared == 0
