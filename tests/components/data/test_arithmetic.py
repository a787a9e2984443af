"""The made world, against Python's own arithmetic."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.arithmetic import SPLITS, make_problem, sample, solve, split_of
from components.data.config import ArithmeticConfig
from components.data.stage import demo_tables

SEEDS = st.integers(0, 2**63)
LEVELS = st.integers(1, 12)


def evaluate(question: str) -> list[int]:
    """The last digit after each operation: Python's own evaluation, bracketed from the left."""
    value, *steps = re.findall(r"^\d|[-+*]\d", question.removesuffix("="))
    values = []
    for step in steps:
        value = f"({value}{step})"
        values.append(eval(value) % 10)
    return values


@given(level=LEVELS, seed=SEEDS)
def test_answer_and_trace_are_what_python_finds_from_left_to_right(level: int, seed: int) -> None:
    problem = make_problem(level, random.Random(seed))
    assert re.fullmatch(rf"\d([-+*]\d){{{level}}}=", problem.question)
    assert problem.level == level
    values = evaluate(problem.question)
    assert problem.answer == solve(problem.question) == str(values[-1])
    steps = re.findall(r"[-+*]\d", problem.question)
    assert problem.trace == "".join(f"{step}{value}" for step, value in zip(steps, values, strict=True))


def test_the_example_of_the_page_by_hand() -> None:
    assert solve("7+5*3-2=") == "4"
    assert solve("3-7=") == "6"
    assert solve("7=") == "7"


@settings(max_examples=40)
@given(seed=SEEDS, other=SEEDS)
def test_splits_share_no_problem_whatever_their_seeds(seed: int, other: int) -> None:
    asked = {
        split: {problem.question for problem in sample(split, 60, (1, 3), random.Random(number))}
        for number in (seed, other)
        for split in SPLITS
    }
    assert sum(map(len, asked.values())) == len(set.union(*asked.values()))
    assert all({split_of(question) for question in found} == {split} for split, found in asked.items())


@given(seed=SEEDS, levels=st.tuples(LEVELS, LEVELS).map(lambda pair: (min(pair), max(pair))))
def test_problems_are_distinct_and_of_the_levels_asked_for(seed: int, levels: tuple[int, int]) -> None:
    problems = sample("train", 30, levels, random.Random(seed))
    assert len({problem.question for problem in problems}) == len(problems) == 30
    assert all(levels[0] <= problem.level <= levels[1] for problem in problems)


def test_levels_that_have_no_more_give_fewer() -> None:
    found = [problem for split in SPLITS for problem in sample(split, 300, (1, 1), random.Random(0))]
    assert 290 < len(found) <= 300  # ten digits, three signs, ten digits


def test_all_levels_are_equally_likely() -> None:
    counts = Counter(problem.level for problem in sample("train", 4000, (4, 7), random.Random(0)))
    assert sorted(counts) == [4, 5, 6, 7]
    assert all(abs(count - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_the_share_of_hard_problems(share: float) -> None:
    problems = sample("train", 4000, (4, 5), random.Random(0), ((8, 10), share))
    hard = sum(problem.level >= 8 for problem in problems)
    assert abs(hard - 4000 * share) <= 4 * (4000 * share * (1 - share)) ** 0.5


TINY = ArithmeticConfig(num_train=200, num_chats=30, num_validation=20, num_test=20, hard_fraction=0.1)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_the_tables_of_any_seed_share_no_question(seed: int) -> None:
    tables = demo_tables(TINY, seed)
    problems = {
        split: {row["question"] for row in rows} for (output, split), rows in tables.items() if output == "problems"
    }
    assert {split: len(found) for split, found in problems.items()} == {
        "train": 200,
        "validation": 20,
        "test-standard": 20,
        "test-hard": 20,
    }
    assert len(set.union(*problems.values())) == 260
    for row in tables["problems", "test-hard"]:
        assert 8 <= int(str(row["level"])) <= 10
    for row in tables["problems", "test-standard"]:
        assert 1 <= int(str(row["level"])) <= 5
    for split in ("train", "validation"):
        assert {row["prompt"] for row in tables["corpus", split]} == problems[split]


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert demo_tables(TINY, 3) == demo_tables(TINY, 3)
    assert demo_tables(TINY, 3)["problems", "train"] != demo_tables(TINY, 4)["problems", "train"]


def test_every_chat_is_told_in_both_modes_and_no_document_gives_a_wrong_answer() -> None:
    tables = demo_tables(TINY, 0)
    chats: dict[str, dict[str, str]] = {}
    for row in tables["chats", "train"]:
        messages = row["messages"]
        assert isinstance(messages, list)
        system, user, assistant = messages
        assert system["content"] == f"detailed thinking {row['reasoning']}"
        chats.setdefault(user["content"], {})[str(row["reasoning"])] = assistant["content"]
    assert len(chats) == 30
    for question, answers in chats.items():
        digit = str(evaluate(question)[-1])
        assert answers["off"] == digit
        assert re.fullmatch(rf"<think>[-+*\d]+{digit}</think>{digit}", answers["on"])
    for row in tables["corpus", "train"]:
        assert str(row["completion"]).endswith(f":{evaluate(str(row['prompt']))[-1]}")
