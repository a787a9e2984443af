"""What is seen of a user's data before a run, against lengths that one can count."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import DataError
from components.data import survey
from components.data.survey import evenly, percentile
from tests.components.core import tiny_models


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A model with a token a character."""
    return tiny_models.write(tiny_models.llama(0), tmp_path / "model")


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_documents_are_counted_in_tokens_of_the_parent(parent: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", [{"text": "a" * number} for number in range(1, 101)])
    facts = survey.survey(parent, corpus, None, None).corpus
    assert facts is not None
    assert facts.tokens == sum(range(1, 101)) + 100  # and the token that ends each
    assert facts.document_tokens == 100  # 99 of 100 documents have at most 99 characters
    assert not facts.estimated


def test_a_large_corpus_is_estimated_from_its_beginning(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "SURVEYED_BYTES", 1000)
    corpus = write(tmp_path / "corpus", [{"text": "a" * 100}] * 500)
    facts = survey.survey(parent, corpus, None, None).corpus
    assert facts is not None
    assert facts.estimated
    assert facts.tokens == pytest.approx(500 * 101, rel=0.15)  # the file has more than the texts


def test_thinking_is_part_of_a_chat_and_of_its_answer(parent: Path, tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": f"<think>{'a' * 40}</think>b"}
    plain = {"role": "assistant", "content": "b"}
    ask = {"role": "user", "content": "c"}
    chats = write(tmp_path / "chats", [{"messages": [ask, answer]} for answer in (thought, plain)])
    facts = survey.survey(parent, None, chats, None).chats
    assert facts is not None
    assert (facts.num_chats, facts.num_thinking) == (2, 1)
    assert facts.answer_tokens == 2 + 40 + 1 + 1  # the tags, the thought, the answer and its end
    assert facts.chat_tokens == facts.longest_chat > facts.answer_tokens


def test_the_smoke_question_is_a_short_one(parent: Path, tmp_path: Path) -> None:
    problems = write(tmp_path / "problems", [{"question": "1" * n, "answer": "2"} for n in range(1, 101)])
    facts = survey.survey(parent, None, None, problems).problems
    assert facts is not None
    assert facts.num_problems == 100
    assert len(facts.question) == 26
    assert facts.prompt_tokens >= 100


def test_malformed_rows_are_named(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 malformed lines"):
        survey.survey(parent, None, write(tmp_path / "chats", [{"nothing": 1}]), None)


def test_a_sample_is_spread_over_all_rows() -> None:
    rows: list[dict[str, object]] = [{"n": n} for n in range(10)]
    assert [row["n"] for row in evenly(rows, 5)] == [0, 2, 4, 6, 8]
    assert len(evenly(rows, 100)) == 10
    assert percentile([1] * 98 + [7, 9]) == 7
