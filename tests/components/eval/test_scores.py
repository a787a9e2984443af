import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.core.base.errors import DataError
from components.core.text.judges.reasoning_tasks import Verifier, make_problem
from components.core.text.judges.worker_pool import JudgeFailed
from components.core.text.problems import Problem
from components.eval.answer_rows import AnswerRow, PromptMode, read_answers, ungraded, write_answers
from components.eval.answers import load_problems
from components.eval.client import grade, joined
from components.eval.scores import effective_number, interval, pass_at_1, scores
from tests.components.conftest import write_rows


def answer_row(split: str, mode: PromptMode, *correct: bool, format_ok: tuple[bool, ...] | None = None) -> AnswerRow:
    common = {"model": "sft", "id": "p", "question": "2+2=", "expected": "4", "samples": ("x",) * len(correct)}
    return AnswerRow(split=split, mode=mode, correct=correct, format_ok=format_ok, **common)


def test_both_modes_are_counted_apart():
    rows = [
        answer_row("standard", "on", True, False, format_ok=(True, True)),
        answer_row("standard", "on", True, True, format_ok=(True, False)),
        answer_row("standard", "off", False, format_ok=(True,)),
        answer_row("standard", "off", True, format_ok=(False,)),
        answer_row("hard", "on", True, False, format_ok=(True, True)),
        answer_row("hard", "off", False, format_ok=(True,)),
    ]
    found = scores(rows)

    assert found["accuracy"] == {"standard": {"on": 0.75, "off": 0.5}, "hard": {"on": 0.5, "off": 0.0}}
    assert found["format"] == {"on": 5 / 6, "off": 2 / 3}  # over both splits
    assert found["answers"] == {"standard": {"on": 4, "off": 2}, "hard": {"on": 2, "off": 1}}
    low, high = found["interval"]["standard"]["on"]
    assert low < 0.75 < high


def test_a_base_model_has_one_way_and_no_format():
    found = scores([answer_row("standard", "plain", True), answer_row("standard", "plain", False)])

    assert found["accuracy"] == {"standard": {"on": 0.5, "off": None}, "hard": {"on": None, "off": None}}
    assert found["interval"]["standard"]["off"] is None
    assert found["format"] == {"on": None, "off": None}


@pytest.mark.parametrize(
    ("reasoning", "content", "mode", "correct", "kept"),
    [
        ("2+2=4", "4", "on", True, True),
        ("2+2=5", "5", "on", False, True),
        ("", "4", "on", True, False),
        (" \n", "4", "on", True, False),
        ("2+2=4", "", "on", False, False),  # cut off while it was thinking
        ("2+2=4", "<think>4", "on", False, False),
        ("", "4", "off", True, True),
        ("2+2=4", "4", "off", True, False),
        ("", "4</think>", "off", False, False),
        ("", " ", "off", False, False),
    ],
)
def test_a_tuned_model_is_right_by_its_answer_and_keeps_the_format_of_its_mode(reasoning, content, mode, correct, kept):
    row = grade("sft", Problem("standard", 0, "p", "2+2=", "2+2=", "4"), mode, [joined(reasoning, content)])

    assert (row.correct, row.format_ok) == ((correct,), (kept,))


def test_answers_to_a_problem_with_a_verifier_have_its_scores():
    gym = pytest.importorskip("reasoning_gym")
    made = make_problem("spell_backward", {}, seed=1, size=1, index=0)
    question, answer = str(made["question"]), str(made["answer"])
    problem = Problem("standard", 0, "p", question, question, answer, Verifier.of_row(made))
    row = grade("sft", problem, "on", [joined("because", each) for each in (answer, answer[:-1], "!")])

    dataset = gym.create_dataset("spell_backward", seed=1, size=1)
    expected = tuple(dataset.score_answer(each, dataset[0]) for each in (answer, answer[:-1], "!"))
    assert 1 == expected[0] > expected[1] > expected[2] == 0
    assert row.scores == expected
    assert row.correct == (True, False, False)
    assert row.format_ok == (True, True, True)
    found = scores([row, answer_row("standard", "on", True, False)])
    assert found["accuracy"]["standard"]["on"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found["score"]["standard"]["on"] == pytest.approx((sum(expected) / 3 + 1 / 2) / 2)


def test_an_answer_that_cannot_be_graded_is_neither_right_nor_wrong(monkeypatch):
    def judge(answer: str, expected: str) -> bool:
        raise JudgeFailed("comparing takes more than 5 s of processor time")

    problem = Problem("standard", 0, "p", "2+2=", "2+2=", "4")
    graded = grade("sft", problem, "on", ["<think>x</think>4"])
    monkeypatch.setattr("components.core.text.problems.verify", judge)
    failed = grade("rl", problem, "on", ["<think>x</think>4"])

    assert failed.correct == ()
    assert ungraded([graded, failed]) == {("standard", "p"): "comparing takes more than 5 s of processor time"}
    assert ungraded([graded]) == {}


def test_a_base_model_is_right_by_what_follows_its_last_colon():
    row = grade("parent", Problem("hard", 0, "p", "2+2=", "2+2=", "4"), "plain", ["+24:4", "+25:5", "4: 5", "4"])

    assert (row.correct, row.format_ok) == ((True, False, False, True), None)


def test_answers_are_read_as_they_were_written(tmp_path):
    rows = [answer_row("hard", "on", True, False, format_ok=(True, False)), answer_row("hard", "plain", True)]
    rows.append(rows[0].model_copy(update={"samples": ("a\u2028b\x85c", "d\r\ne")}))
    write_answers(tmp_path / "answers.jsonl", rows)

    assert read_answers(tmp_path / "answers.jsonl") == rows


def problem_row(number: int) -> dict[str, object]:
    return {"id": number, "question": "q", "prompt": "q\nAnswer:", "answer": 4, "level": 1}


def test_problems_are_cut_to_a_number_in_each_split_that_is_there(tmp_path):
    write_rows(tmp_path / "test-standard.jsonl", map(problem_row, range(5)))
    found = load_problems(tmp_path, 3)

    assert found == [Problem("standard", i, str(i), "q", "q\nAnswer:", "4") for i in range(3)]

    write_rows(tmp_path / "test-hard.jsonl", [problem_row(7)])
    assert [each.id for each in load_problems(tmp_path, 2)] == ["0", "1", "7"]


def test_without_problems_there_is_nothing_to_ask(tmp_path):
    write_rows(tmp_path / "test-standard.jsonl", [])
    assert load_problems(tmp_path, 3) == []


def test_a_problem_that_lacks_a_field_is_named(tmp_path):
    write_rows(tmp_path / "test-standard.jsonl", [problem_row(0), {"id": 1, "question": "q", "answer": "4"}])
    with pytest.raises(DataError, match=r"test-standard\.jsonl line 2: no 'prompt'"):
        load_problems(tmp_path, 3)


RIGHT = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=30)


def single(right: int, wrong: int) -> list[list[bool]]:
    """One answer to each problem."""
    return [[True]] * right + [[False]] * wrong


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # R: prop.test(right, total, correct = FALSE)
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (81, 263, 0.2552966, 0.3662128),
        (15, 148, 0.0623863, 0.1605399),
        (1, 29, 0.0061130, 0.1717552),
    ],
)
def test_interval_of_single_answers_is_wilsons(right, total, low, high):
    assert interval(single(right, total - right)) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("right", "wrong"), [(3, 7), (1, 29), (50, 50)])
def test_ends_of_the_interval_are_where_the_score_test_turns(right, wrong):
    """Wilson's interval holds the shares that a score test at 5 % does not reject: found by trying all of them."""
    n, p = right + wrong, right / (right + wrong)
    checkpoint = [
        q / 100000 for q in range(1, 100000) if abs(p - q / 100000) <= 1.959964 * math.sqrt(q / 1e5 * (1 - q / 1e5) / n)
    ]

    assert interval(single(right, wrong)) == pytest.approx((checkpoint[0], checkpoint[-1]), abs=2e-5)


@settings(max_examples=40)
@given(RIGHT)
def test_the_interval_holds_the_share_and_stays_between_0_and_1(right):
    low, high = interval(right)

    assert 0 <= low <= pass_at_1(right) + 1e-12
    assert pass_at_1(right) - 1e-12 <= high <= 1
    assert high - low > 0


@settings(max_examples=40)
@given(RIGHT)
def test_the_effective_number_lies_between_problems_and_answers(right):
    assert len(right) <= effective_number(right) <= sum(map(len, right))


@settings(max_examples=40)
@given(RIGHT, st.randoms())
def test_order_of_problems_and_answers_does_not_matter(right, generator: random.Random):
    mixed = [generator.sample(answers, len(answers)) for answers in generator.sample(right, len(right))]

    assert pass_at_1(mixed) == pytest.approx(pass_at_1(right))
    assert interval(mixed) == pytest.approx(interval(right))


def test_answers_that_always_agree_count_once_a_problem():
    once, often = [[True]] * 30 + [[False]] * 10, [[True] * 8] * 30 + [[False] * 8] * 10

    assert effective_number(often) == 40
    assert interval(often) == pytest.approx(interval(once))


def test_answers_that_differ_within_problems_alone_all_count():
    assert effective_number([[True, False]] * 20) == 40


def test_the_effective_number_explains_the_spread_of_repeated_experiments():
    """Variance of pass@1 over many simulated evaluations is p(1 - p) over the effective number."""
    generator = random.Random(0)

    def evaluation() -> list[list[bool]]:
        ability = [generator.choice([0.2, 0.8]) for _ in range(100)]
        return [[generator.random() < each for _ in range(4)] for each in ability]

    found = [evaluation() for _ in range(400)]
    means = [pass_at_1(each) for each in found]
    mean = sum(means) / len(means)
    variance = sum((each - mean) ** 2 for each in means) / len(means)
    expected = sum(effective_number(each) for each in found) / len(found)

    assert mean * (1 - mean) / variance == pytest.approx(expected, rel=0.2)


def test_problems_weigh_the_same_however_often_they_are_answered():
    assert pass_at_1([[True, True, True], [False]]) == 0.5
