"""What is counted, from answers that are made up."""

from types import SimpleNamespace

import pytest

from components.core.chat import plain_answer
from components.core.errors import DataError
from components.eval.asking import Answered, keeps_format, reasoning_of
from components.eval.stage import load_tests, scores
from tests.components.conftest import write_rows


def answered(*right: bool, kept: tuple[bool, ...] | None = None) -> Answered:
    return Answered("p", "4", ("x",) * len(right), right, kept)


def test_both_modes_are_counted_apart():
    on = [answered(True, False, kept=(True, True)), answered(True, True, kept=(True, False))]
    off = [answered(False, kept=(True,)), answered(True, kept=(False,))]
    found = scores({"standard": {"on": on, "off": off}, "hard": {"on": on[:1], "off": off[:1]}})

    assert found["accuracy"] == {"standard": {"on": 0.75, "off": 0.5}, "hard": {"on": 0.5, "off": 0.0}}
    assert found["format"] == {"on": 5 / 6, "off": 2 / 3}  # over both splits
    low, high = found["interval"]["standard"]["on"]
    assert low < 0.75 < high


def test_a_base_model_has_one_way_and_no_format():
    found = scores({"standard": {"plain": [answered(True), answered(False)]}})

    assert found["accuracy"] == {"standard": {"on": 0.5, "off": None}, "hard": {"on": None, "off": None}}
    assert found["interval"]["standard"]["off"] is None
    assert found["format"] == {"on": None, "off": None}


@pytest.mark.parametrize(
    ("reasoning", "content", "way", "kept"),
    [
        ("2+2=4", "4", "on", True),
        ("", "4", "on", False),
        (" \n", "4", "on", False),
        ("2+2=4", "", "on", False),
        ("2+2=4", "<think>4", "on", False),
        ("", "4", "off", True),
        ("2+2=4", "4", "off", False),
        ("", "4</think>", "off", False),
        ("", " ", "off", False),
    ],
)
def test_format(reasoning, content, way, kept):
    assert keeps_format(reasoning, content, way) is kept


def test_reasoning_is_read_under_either_name():
    assert reasoning_of(SimpleNamespace(model_extra={"reasoning": "a"})) == "a"
    assert reasoning_of(SimpleNamespace(model_extra={"reasoning_content": "b"})) == "b"
    assert reasoning_of(SimpleNamespace(model_extra=None)) == ""


@pytest.mark.parametrize(("text", "answer"), [("7+5=2 2*3=6: 6", "6"), (" 6 \n", "6"), ("a: b: 7", "7"), ("", "")])
def test_the_answer_of_a_base_model_follows_its_last_colon(text, answer):
    assert plain_answer(text) == answer


def test_problems_are_cut_to_a_number_and_empty_splits_left_out(tmp_path):
    write_rows(tmp_path / "test-standard.jsonl", [{"id": i} for i in range(5)])
    write_rows(tmp_path / "test-hard.jsonl", [])
    assert load_tests(tmp_path, 3) == {"standard": [{"id": 0}, {"id": 1}, {"id": 2}]}

    write_rows(tmp_path / "test-standard.jsonl", [])
    with pytest.raises(DataError, match="no test problems"):
        load_tests(tmp_path, 3)
