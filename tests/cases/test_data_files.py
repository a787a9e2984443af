"""Corpora, chats and problems in the forms in which people have them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from components.core.base.errors import DataError
from components.core.text.problems import with_distinct_ids
from components.core.text.verifier import verify
from components.data.chat_forms import chat_row
from components.data.own_files import chat_rows, problem_rows
from tests.components.data.whole_corpus import corpus_rows

ROWS = [{"text": "one"}, {"text": "two"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.jsonl", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("content", [LINES, json.dumps(ROWS), json.dumps(ROWS, indent=2), json.dumps({"data": ROWS})])
def test_rows_are_read_from_lines_and_arrays_under_any_ending(tmp_path, name, content):
    if content.startswith('{"data"') and ".json." not in f"{name}.":
        pytest.skip("an object around the rows is read from .json")
    data = content.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    (tmp_path / name).write_bytes(data)
    assert corpus_rows(tmp_path, skip_bad=False) == (ROWS, 0)


def test_json_that_holds_no_rows_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"config": 1}')
    with pytest.raises(DataError, match=r"a\.json item 1: no 'text'"):
        corpus_rows(tmp_path, skip_bad=False)


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz.*damaged.*b\.parquet.*damaged Parquet"):
        corpus_rows(tmp_path, skip_bad=False)


def test_of_a_folder_cloned_from_a_hub_the_tables_are_read_and_the_card_is_named(tmp_path):
    (tmp_path / "README.md").write_text("# a data set\n")
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "data" / "train-0.parquet")
    notes: list[str] = []

    assert corpus_rows(tmp_path, skip_bad=False, notes=notes) == (ROWS, 0)
    assert notes == ["left out: 1 files that describe the data, such as README.md"]


def test_a_folder_of_documents_keeps_its_readme(tmp_path):
    (tmp_path / "README.md").write_text("text\n")
    assert corpus_rows(tmp_path, skip_bad=False) == ([{"text": "text\n"}], 0)


def test_what_is_left_out_is_named_by_reason_with_an_example(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES + '{"texts": 1}\n{"texts": 2}\nx\n')
    notes: list[str] = []

    assert corpus_rows(tmp_path, skip_bad=True, notes=notes) == (ROWS, 3)
    assert notes[0] == """left out: a.jsonl line 3: no 'text' (and 1 more like it), such as {"texts": 1}"""
    assert notes[1].startswith("left out: a.jsonl line 5: not JSON")


ASKED, SAID = {"role": "user", "content": "7+5="}, {"role": "assistant", "content": "12"}
THOUGHT = {"role": "assistant", "content": "<think>5+7</think>12"}


@pytest.mark.parametrize(
    ("row", "turns", "mode"),
    [
        ({"instruction": "7+5=", "output": "12"}, [ASKED, SAID], "off"),
        ({"instruction": "7+5=", "input": "", "output": "12"}, [ASKED, SAID], "off"),
        (
            {"instruction": "Add.", "input": "7+5=", "output": "12"},
            [{"role": "user", "content": "Add.\n\n7+5="}, SAID],
            "off",
        ),
        (
            {"conversations": [{"from": "human", "value": "7+5="}, {"from": "gpt", "value": "12"}]},
            [ASKED, SAID],
            "off",
        ),
        ({"conversations": [ASKED, SAID]}, [ASKED, SAID], "off"),
        ({"prompt": "7+5=", "completion": "12"}, [ASKED, SAID], "off"),
        ({"prompt": "7+5=", "response": "12"}, [ASKED, SAID], "off"),
        ({"prompt": [ASKED], "completion": [SAID]}, [ASKED, SAID], "off"),
        ({"messages": [ASKED, {**SAID, "reasoning_content": "5+7"}]}, [ASKED, THOUGHT], "on"),
        ({"messages": [ASKED, {**SAID, "reasoning": "5+7"}]}, [ASKED, THOUGHT], "on"),
        ({"messages": [ASKED, {**SAID, "thinking": "5+7"}]}, [ASKED, THOUGHT], "on"),
        ({"messages": [ASKED, {**SAID, "reasoning_content": None}]}, [ASKED, SAID], "off"),
        ({"messages": [ASKED, {**THOUGHT, "reasoning_content": "5+7"}]}, [ASKED, THOUGHT], "on"),
        ({"instruction": "7+5=", "output": "12", "reasoning_content": "5+7"}, [ASKED, THOUGHT], "on"),
        ({"messages": [ASKED, SAID]}, [ASKED, SAID], "off"),
    ],
)
def test_chats_of_every_form(row: Any, turns: Any, mode: str) -> None:
    found: Any = chat_row(row)
    assert found["messages"][1:] == turns
    assert found["reasoning"] == mode


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "message 2 has no role and text"),
        ({"role": "tool", "content": "12"}, "message 2 is of role 'tool' where 'assistant' is due"),
        ({"role": "developer", "content": "12"}, "message 2 is of role 'developer' where 'assistant' is due"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "message 2 has no role and text"),
    ],
)
def test_a_chat_that_the_template_has_no_place_for_is_refused_with_its_line(tmp_path, message, reason):
    rows = [{"messages": [ASKED, SAID]}, {"messages": [ASKED, message]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=f"a.jsonl line 2: {reason}"):
        chat_rows(tmp_path, skip_bad=False)


def test_a_line_separator_of_unicode_ends_no_row(tmp_path):
    texts = ["a\u2028b", "c\u2029d\u0085e"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    assert corpus_rows(tmp_path, skip_bad=False) == ([{"text": text} for text in texts], 0)


def test_an_unknown_form_is_named_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "a", "a": "b"}\n' * 1000)
    with pytest.raises(DataError) as caught:
        chat_rows(tmp_path, skip_bad=False)
    assert caught.value.message.count("keys q, a are of no known form") == 1
    assert "(and 999 more like it)" in caught.value.message


def problems(folder: Path, *lines: str, name: str = "p.jsonl") -> Any:
    (folder / name).write_text("\n".join(lines) + "\n")
    return problem_rows(folder, skip_bad=False)[0]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ('{"question": "q", "answer": 0.00001}', "0.00001"),
        ('{"question": "q", "answer": 1e16}', "1e16"),
        ('{"question": "q", "answer": 1.50}', "1.50"),
        ('{"question": "q", "answer": 7}', "7"),
        ('{"question": "q", "answer": "think\\n#### 1,200"}', "1,200"),
        ('{"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "34"}}', "34"),
        ('{"question": "q", "expected_answer": "34"}', "34"),
        ('{"problem": "q", "solution": "so \\\\boxed{\\\\frac{1}{2}}."}', r"\frac{1}{2}"),
        ('{"question": "q", "answer": "\\\\boxed{3}"}', r"\boxed{3}"),
    ],
)
def test_problems_of_every_form_with_the_answer_as_it_was_written(tmp_path, row, answer):
    (found,) = problems(tmp_path, row)
    assert (found["question"], found["answer"]) == ("q", answer)
    assert verify(answer, found["answer"])
    assert problems(tmp_path, f"[{row}]", name="p.jsonl") == [found]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_an_expected_answer_that_is_no_number_is_refused_with_its_line(tmp_path, number):
    with pytest.raises(DataError, match=r"p\.jsonl line 2: answer is -?\w+, which is no number"):
        problems(tmp_path, '{"question": "q", "answer": 1}', f'{{"question": "q", "answer": {number}}}')


def test_a_solution_without_a_box_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"solution has no \\boxed"):
        problems(tmp_path, '{"question": "q", "solution": "it is 7"}')


def test_different_problems_with_one_id_are_told_apart(tmp_path):
    found = problems(tmp_path, *(f'{{"id": {n // 2}, "question": "q{n}", "answer": {n}}}' for n in range(4)))
    assert [row["id"] for row in found] == ["0", "0#2", "1", "1#2"]
    rows: Any = [{"id": "a"}, {"id": "a"}, {"id": "a#2"}, {"id": "a"}]
    assert [row["id"] for row in with_distinct_ids(rows)] == ["a", "a#3", "a#2", "a#4"]
