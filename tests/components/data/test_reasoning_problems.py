"""Problems of reasoning-gym by split."""

from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import DataError, InputError
from components.core.runtime.context import StageContext
from components.core.text.chat import encode_chats
from components.core.text.problems import read_problems
from components.data.config import DataConfig, ReasoningTask
from components.data.splits import question_digest
from components.data.stage import run
from components.eval.answers import load_problems
from tests.components.conftest import Recorder, write_rows
from tests.components.data.test_stage import outputs, read

pytest.importorskip("reasoning_gym")

CONFIG = DataConfig.model_validate(
    {"reasoning_gym": {"chain_sum": 40, "leg_counting": {"num_train": 20, "settings": {"max_animals": 4}}}, "seed": 3}
)


def test_a_number_stands_for_the_training_problems_of_a_task() -> None:
    assert CONFIG.reasoning_gym["chain_sum"] == ReasoningTask(num_train=40)
    assert DataConfig.parse(CONFIG.canonical()) == CONFIG
    with pytest.raises(InputError, match=r"reasoning_gym\.chain_sum\.num_train=0"):
        DataConfig.parse({"reasoning_gym": {"chain_sum": 0}})


def test_no_question_is_in_two_splits_and_the_next_stages_read_them(
    recorded_context: StageContext, recorder: Recorder, tmp_path: Path
) -> None:
    out = outputs(tmp_path / "out")
    result: Any = run(CONFIG, context=recorded_context, out=out)
    assert result["rows"] == {
        "corpus/train": 0,
        "corpus/validation": 0,
        "chats/train": 60,
        "chats/validation": 3,
        "problems/train": 60,
        "problems/validation": 3,
        "problems/test-standard": 3,
        "problems/test-hard": 0,
    }
    rows = [
        row for split in ("train", "validation", "test-standard") for row in read(out / "problems" / f"{split}.jsonl")
    ]
    assert len({question_digest(row["question"]) for row in rows}) == len({row["id"] for row in rows}) == 66
    assert [row["verifier"]["task"] for row in rows[:4]] == ["chain_sum", "leg_counting"] * 2
    assert {len(row["verifier"]["metadata"]["animals"]) for row in rows[1:40:2]} == {3, 4}
    assert len(load_problems(out / "problems", 99)) == 3
    assert all(problem.score(problem.answer) == 1 for problem in read_problems(out / "problems" / "train.jsonl", "", 9))
    chats = read(out / "chats" / "train.jsonl")
    assert len(encode_chats(chats, out / "tokenizer")) == 60
    assert {chat["messages"][1]["content"] for chat in chats} == {row["question"] for row in rows[:60]}
    assert recorder.notes == []


def test_a_users_own_rows_stand_beside_them_without_what_is_held_out(
    recorded_context: StageContext, tmp_path: Path
) -> None:
    first = outputs(tmp_path / "first")
    run(CONFIG, context=recorded_context, out=first)
    held_out = [row for split in ("validation", "test-standard") for row in read(first / "problems" / f"{split}.jsonl")]
    for name in ("chats", "problems"):
        (tmp_path / name).mkdir()
    asked = [(row["question"], row["answer"]) for row in held_out] + [(f"{n}+1=", str(n + 1)) for n in range(40)]
    write_rows(tmp_path / "chats" / "c.jsonl", [{"input": q, "output": a} for q, a in asked])
    write_rows(tmp_path / "problems" / "p.jsonl", [{"question": q, "answer": a} for q, a in asked[6:]])
    out = outputs(tmp_path / "out")
    run(
        CONFIG,
        context=recorded_context,
        out=out,
        own_chats=tmp_path / "chats",
        own_problems=tmp_path / "problems",
    )
    learnt = {chat["messages"][1]["content"] for chat in read(out / "chats" / "train.jsonl")}
    assert not learnt & {row["question"] for row in held_out}
    train = read(out / "problems" / "train.jsonl")
    assert ["verifier" in row for row in train[:6]] == [False, True, True] * 2


def test_a_verifier_of_own_rows_is_kept(recorded_context: StageContext, tmp_path: Path) -> None:
    made = outputs(tmp_path / "made")
    run(CONFIG, context=recorded_context, out=made)
    (tmp_path / "own").mkdir()
    rows = read(made / "problems" / "train.jsonl")
    write_rows(tmp_path / "own" / "p.jsonl", rows)
    out = outputs(tmp_path / "out")
    run(DataConfig(), context=recorded_context, out=out, own_problems=tmp_path / "own")
    assert all(row in rows for row in read(out / "problems" / "train.jsonl"))


def test_a_task_with_few_questions_says_how_many_it_has(
    recorded_context: StageContext, recorder: Recorder, tmp_path: Path
) -> None:
    few = {"min_terms": 2, "max_terms": 2, "max_digits": 1}  # of two digits: 200 sums and differences
    config = DataConfig.model_validate({"reasoning_gym": {"chain_sum": {"num_train": 300, "settings": few}}})
    result: Any = run(config, context=recorded_context, out=outputs(tmp_path / "out"))
    train = result["rows"]["problems/train"]
    assert result["rows"]["problems/validation"] == result["rows"]["problems/test-standard"] == 15
    assert 150 < train <= 170
    assert recorder.notes == [
        f"data.reasoning_gym.chain_sum: {train} different problems for train, not 300: it has no more"
    ]


def test_a_task_without_any_problem_for_training_is_refused(recorded_context: StageContext, tmp_path: Path) -> None:
    one = {"min_terms": 1, "max_terms": 1, "max_digits": 1}
    config = DataConfig.model_validate(
        {"reasoning_gym": {"chain_sum": {"num_train": 200, "settings": one}}, "validation_fraction": 0.4}
    )
    with pytest.raises(DataError, match=r"chain_sum has no problems to train on beside 10 that are held out"):
        run(config, context=recorded_context, out=outputs(tmp_path / "out"))
