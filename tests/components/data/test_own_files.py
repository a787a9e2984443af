"""A user's own files: what is accepted, what is refused with which words, what is left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import DataError
from components.core.text.row_files import Row
from components.data.chat_forms import chat_row
from components.data.own_files import chat_rows, problem_rows, questions
from tests.components.data.whole_corpus import corpus_rows

THOUGHT = "<think>7+5 is 12</think>2"
ASKED = {"role": "user", "content": "7+5="}


def says(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return folder


def toggle(mode: str, extra: str = "") -> dict[str, str]:
    return says(f"detailed thinking {mode}{extra}", "system")


@pytest.mark.parametrize(
    ("row", "mode"),
    [
        ({"messages": [ASKED, says("2")]}, "off"),
        ({"messages": [ASKED, says(THOUGHT)]}, "on"),
        ({"messages": [ASKED, says(f"\n{THOUGHT}")]}, "on"),
        ({"messages": [toggle("on"), ASKED, says(THOUGHT)]}, "on"),
        ({"messages": [toggle("off"), ASKED, says("2")]}, "off"),
        ({"messages": [ASKED, says(THOUGHT)], "reasoning": "on"}, "on"),
        ({"messages": [ASKED, says("2")], "reasoning": None, "id": 4}, "off"),
        ({"input": "7+5=", "output": "2"}, "off"),
        ({"input": "7+5=", "output": THOUGHT, "reasoning": "on"}, "on"),
        ({"input": "7+5=", "output": "2", "reasoning": "off", "system_prompt": ""}, "off"),
        ({"input": [ASKED], "output": THOUGHT, "system_prompt": "detailed thinking on", "category": "math"}, "on"),
        ({"input": [toggle("off"), ASKED], "output": "2", "license": "cc-by-4.0", "version": "v1"}, "off"),
    ],
)
def test_every_form_of_a_chat_gives_the_same_chat(row: Row, mode: str) -> None:
    found = chat_row(row)
    messages: Any = found["messages"]
    assert found["reasoning"] == mode
    assert messages[:2] == [toggle(mode), ASKED]
    assert messages[2]["content"].strip() == (THOUGHT if mode == "on" else "2")


@pytest.mark.parametrize(
    ("system", "kept"),
    [
        ([], ""),
        (["be kind"], "\nbe kind"),
        (["detailed thinking on\nbe kind"], "\nbe kind"),
        (["detailed thinking on", "be kind"], "\nbe kind"),
        (["be kind", "be brief"], "\nbe kind\nbe brief"),
        (["detailed thinking about sums"], "\ndetailed thinking about sums"),
    ],
)
def test_other_system_text_is_kept_behind_the_toggle(system: list[str], kept: str) -> None:
    row: Row = {"messages": [*(says(text, "system") for text in system), ASKED, says(THOUGHT)]}
    messages: Any = chat_row(row)["messages"]
    assert messages == [toggle("on", kept), ASKED, says(THOUGHT)]


def test_a_system_prompt_stands_before_the_system_message_of_the_input() -> None:
    row: Row = {"system_prompt": "be kind", "input": [says("be brief", "system"), ASKED], "output": "2"}
    messages: Any = chat_row(row)["messages"]
    assert messages[0] == toggle("off", "\nbe kind\nbe brief")


def test_turns_before_the_last_stay_as_they_are() -> None:
    turns = [ASKED, says(THOUGHT), says("3-7=", "user"), says("6")]
    messages: Any = chat_row({"messages": turns})["messages"]
    assert messages == [toggle("off"), *turns]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [ASKED, says("2")], "reasoning": "on"}, "reasoning is on, but the answer is not <think>"),
        ({"messages": [ASKED, says("<think>a</think>")]}, "reasoning is on, but the answer is not <think>"),
        ({"messages": [ASKED, says("<think></think>2")]}, "reasoning is on, but the answer is not <think>"),
        ({"messages": [ASKED, says("<think>a 2")]}, "reasoning is on, but the answer is not <think>"),
        ({"messages": [ASKED, says(THOUGHT)], "reasoning": "off"}, "reasoning is off, but the answer is not an answer"),
        ({"messages": [ASKED, says("a</think>2")]}, "reasoning is off, but the answer is not an answer without"),
        ({"messages": [toggle("off"), ASKED, says(THOUGHT)]}, "reasoning is off, but"),
        ({"messages": [toggle("on"), ASKED, says("2")], "reasoning": "off"}, "message says on, and reasoning off"),
        ({"messages": [toggle("on"), toggle("off"), ASKED, says("2")]}, "message says on, and reasoning off"),
        ({"messages": [ASKED, says("2")], "reasoning": "maybe"}, "reasoning='maybe' is neither on nor off"),
        ({"messages": [ASKED, says("2")], "reasoning": True}, "reasoning='True' is neither on nor off"),
        ({"messages": [ASKED]}, "the last message is not an answer"),
        ({"messages": []}, "the last message is not an answer"),
        ({"messages": [ASKED, says("1"), says("2")]}, "message 3 is of role 'assistant' where 'user' is due"),
        ({"messages": [ASKED, toggle("on"), says("2")]}, "message 2 is of role 'system' where 'assistant' is due"),
        ({"messages": [ASKED, says("2", "tool")]}, "message 2 is of role 'tool'"),
        ({"messages": [says(" ", "user"), says("2")]}, "empty question"),
        ({"messages": [ASKED, says(" ")]}, "empty answer"),
        ({"messages": "7+5="}, "the messages are not a list"),
        ({"messages": ["7+5=", "2"]}, "message 1 has no role and text"),
        ({"messages": [{"role": "user"}, says("2")]}, "message 1 has no role and text"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "message 2 has no role and text"),
        ({"input": None, "output": "2"}, "the messages are not a list"),
        ({"input": ASKED, "output": "2"}, "the messages are not a list"),
        ({"input": "7+5=", "output": 2}, "message 2 has no role and text"),
        ({"input": "7+5="}, "no 'output'"),
        ({"text": "7+5=2"}, "keys text are of no known form: give messages, conversations"),
    ],
)
def test_a_chat_that_contradicts_itself_or_lacks_something_is_refused(row: Row, reason: str, folder: Path) -> None:
    good: Row = {"input": "7+5=", "output": "2"}
    with pytest.raises(DataError) as caught:
        chat_rows(write(folder, good, row), skip_bad=False)
    assert caught.value.message.startswith("1 malformed lines: rows.jsonl line 2: ")
    assert reason in caught.value.message
    rows, skipped = chat_rows(folder, skip_bad=True)
    assert (rows, skipped) == ([chat_row(good)], 1)


@pytest.mark.parametrize("key", ["question", "problem", "prompt"])
def test_every_form_of_a_problem(folder: Path, key: str) -> None:
    rows = [
        {key: "7+5=", "answer": "2"},
        {key: "3-7=", "answer": 6, "id": 12, "level": 3},
        {key: "1/2=", "answer": 0.5, "id": None, "level": "Level 5"},
    ]
    found, skipped = problem_rows(write(folder, *rows), skip_bad=False)
    assert skipped == 0
    assert [row["question"] for row in found] == ["7+5=", "3-7=", "1/2="]
    assert [row["answer"] for row in found] == ["2", "6", "0.5"]
    assert [row["level"] for row in found] == [0, 3, 5]
    assert found[0]["prompt"] == "7+5=\nAnswer:"
    assert found[1]["id"] == "12"
    assert len({str(row["id"]) for row in found}) == 3
    assert "None" not in {row["id"] for row in found}


@pytest.mark.parametrize(
    ("level", "read"),
    [(None, 0), (0, 0), (12, 12), (3.0, 3), (2.5, 0), ("4", 4), ("Level 4 ", 4), ("Level ?", 0), ("2.5", 0), ([1], 0)],
)
def test_a_level_is_a_whole_number_or_a_text_that_ends_with_one(folder: Path, level: object, read: int) -> None:
    rows, _ = problem_rows(write(folder, {"question": "a", "answer": "b", "level": level}), skip_bad=False)
    assert rows[0]["level"] == read


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "7+5="}, "no 'answer'"),
        ({"answer": "2"}, "no 'question'"),
        ({"question": " ", "answer": "2"}, "question is not a text"),
        ({"question": 7, "answer": "2"}, "question is not a text"),
        ({"question": "7+5=", "answer": " "}, "answer is not a text or number"),
        ({"question": "7+5=", "answer": True}, "answer is not a text or number"),
        ({"question": "7+5=", "answer": None}, "answer is not a text or number"),
        ({"question": "7+5=", "answer": ["2"]}, "answer is not a text or number"),
    ],
)
def test_a_problem_without_question_or_answer_is_refused(row: Row, reason: str, folder: Path) -> None:
    with pytest.raises(DataError, match=f"1 malformed lines: rows.jsonl line 1: {reason}"):
        problem_rows(write(folder, row), skip_bad=False)


def test_a_corpus_of_texts_and_tables_in_folders(folder: Path) -> None:
    write(folder, {"text": "one"}, {"prompt": "7+5=", "completion": "2", "source": "me"}, name="b/rows.JSONL")
    (folder / "a.py").write_text("\ufeffdef two(): ...\n", encoding="utf-8")
    (folder / "c.txt").write_text("drei — три\n", encoding="utf-8")
    (folder / "empty.txt").write_text(" \n")
    rows, skipped = corpus_rows(folder, skip_bad=False)
    assert skipped == 0
    assert rows == [
        {"text": "one"},
        {"prompt": "7+5=", "completion": "2"},
        {"text": "def two(): ...\n"},
        {"text": "drei — три\n"},
    ]


def test_a_corpus_file_that_is_no_text_is_refused_by_name_or_left_out_and_counted(folder: Path) -> None:
    write(folder, {"text": "one"}, "", {"text": 2}, {"text": "\u00e9"}, name="rows.jsonl")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "wide.txt").write_bytes("text".encode("utf-16"))
    rows, skipped = corpus_rows(folder, skip_bad=True)
    assert (rows, skipped) == ([{"text": "one"}, {"text": "\u00e9"}], 5)
    with pytest.raises(DataError, match=r"2 malformed lines: rows\.jsonl line 2: empty line; rows\.jsonl line 3"):
        corpus_rows(folder, skip_bad=False)
    write(folder, {"text": "one"})
    with pytest.raises(DataError, match="3 files of the corpus are no text: ") as caught:
        corpus_rows(folder, skip_bad=False)
    for told in ("latin.txt: not UTF-8 (byte 0xe9 at 1)", "pictures/a.png: binary", "wide.txt: binary"):
        assert told in caught.value.message
    assert "--skip-bad" in str(caught.value.hint)


Reader = Callable[..., tuple[list[Row], int]]


@pytest.mark.parametrize("read", [corpus_rows, chat_rows, problem_rows])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_files_with_no_row_at_all_are_refused_even_where_bad_lines_may_go(
    read: Reader, content: str, folder: Path
) -> None:
    (folder / "rows.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        read(folder, skip_bad=True)
    assert "no text" in caught.value.message or "there are no" in caught.value.message
    assert "give" in str(caught.value.hint)


def test_what_a_row_asks() -> None:
    assert questions(chat_row({"messages": [ASKED, says("2"), says("3-7=", "user"), says("6")]})) == ["7+5=", "3-7="]
