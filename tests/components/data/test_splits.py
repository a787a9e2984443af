"""Nothing that is asked in a test or in validation is trained on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.text.row_files import Row
from components.data.splits import (
    TEST,
    VALIDATION,
    hardest_levels,
    hold_out,
    question_digest,
    split_chats,
    split_problems,
)

QUESTIONS = st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=30)
SHARES = st.floats(0.01, 0.49)


def problem(question: str, level: int = 0) -> Row:
    return {"question": question, "level": level}


def names(rows: list[Row]) -> set[bytes]:
    return {question_digest(str(row["question"])) for row in rows}


def test_white_space_makes_no_other_question() -> None:
    assert question_digest(" 7 +\n5 ") == question_digest("7 + 5") != question_digest("7+5")


def test_near_duplicates_have_one_hash_and_other_sums_have_another() -> None:
    assert question_digest("What is 7 + 5?") == question_digest("what  is 7 + 5")
    assert question_digest("\u201cOne\u201d \ufb01t\u2026") == question_digest("one fit")
    assert len({question_digest(f"7 {sign} 5 =") for sign in "+-*/^<>%"}) == 8
    assert len({question_digest(mark) for mark in ".,?!"}) == 4


@pytest.mark.parametrize("purpose", [VALIDATION, TEST])
def test_about_the_share_is_held_out(purpose: int) -> None:
    asked = {question_digest(str(number)) for number in range(10000)}
    held = hold_out(asked, 0.1, purpose)
    assert held < asked
    assert abs(len(held) - 1000) < 4 * 30


@given(asked=QUESTIONS, share=SHARES)
def test_at_least_one_and_never_all_are_held_out(asked: list[str], share: float) -> None:
    distinct = set(map(question_digest, asked))
    held = hold_out(distinct, share, TEST)
    assert held <= distinct
    assert (len(held) == 0) if len(distinct) < 2 else (0 < len(held) < len(distinct))


def test_what_is_held_out_does_not_hang_on_order_or_repetition() -> None:
    asked = [question_digest(str(number)) for number in range(100)]
    assert hold_out(asked, 0.2, TEST) == hold_out([*reversed(asked), *asked], 0.2, TEST)


@pytest.mark.parametrize(
    ("levels", "hardest"),
    [
        ([], set()),
        ([0, 0], set()),
        ([1, 2], {2}),
        ([1, 2, 3, 3], {3}),
        ([1, 2, 3, 4, 5], {5}),
        ([9, 1, 3, 5, 7, 2], {7, 9}),
    ],
)
def test_the_top_third_of_levels_is_hard(levels: list[int], hardest: set[object]) -> None:
    assert hardest_levels([problem("a", level) for level in levels]) == hardest


@given(asked=st.lists(st.tuples(st.text(alphabet="ab ", min_size=1, max_size=4), st.integers(0, 3))), share=SHARES)
def test_every_problem_is_in_one_split_and_no_question_in_two(asked: list[tuple[str, int]], share: float) -> None:
    rows = [problem(*pair) for pair in asked]
    splits = split_problems(rows, share, share)
    assert sorted(map(str, rows)) == sorted(str(row) for out in splits.values() for row in out)
    train, validation = names(splits["train"]), names(splits["validation"])
    test = names(splits["test-standard"]) | names(splits["test-hard"])
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_a_users_hard_problems_fill_the_hard_test_and_others_do_not() -> None:
    splits = split_problems([problem(str(number), number % 6) for number in range(600)], 0.05, 0.1)
    assert {row["level"] for row in splits["test-hard"]} == {4, 5}
    assert {row["level"] for row in splits["test-standard"]} == {0, 1, 2, 3}
    assert {row["level"] for row in splits["train"]} == {0, 1, 2, 3, 4, 5}


def test_few_hard_problems_are_enough_for_a_hard_test() -> None:
    splits = split_problems([problem(str(number), number // 40) for number in range(42)], 0.05, 0.05)
    assert len(splits["test-hard"]) == 1
    assert splits["test-standard"]


def test_without_levels_the_hard_test_is_empty() -> None:
    splits = split_problems([problem(str(number)) for number in range(100)], 0.05, 0.05)
    assert splits["test-hard"] == []
    assert splits["test-standard"]


@given(
    asked=st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3)),
    held=st.sets(st.sampled_from("abcdefgh")),
)
def test_no_row_for_training_asks_what_is_held_out_and_equal_first_questions_stay_together(
    asked: list[list[str]], held: set[str]
) -> None:
    rows: list[Row] = [{"asks": row} for row in asked]

    def questions(row: Row) -> list[str]:
        return row["asks"]  # type: ignore[return-value]

    splits = split_chats(rows, questions, 0.2, set(map(question_digest, held)))
    assert len(splits["train"]) + len(splits["validation"]) == len(rows)
    assert not any(held & set(questions(row)) for row in splits["train"])
    trained = {questions(row)[0] for row in splits["train"]}
    alone = (questions(row) for row in splits["validation"] if len(questions(row)) == 1)
    assert not trained & {asks[0] for asks in alone if asks[0] not in held}
