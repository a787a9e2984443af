"""Tasks of reasoning-gym against the package itself, in this process."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from components.core.base.errors import InputError
from components.core.text.judges import reasoning_tasks
from components.core.text.judges.reasoning_tasks import Verifier, make_problem, require_tasks
from components.core.text.judges.worker_pool import JudgeFailed
from components.core.text.problems import Problem, read_problems, score_answer
from tests.components.conftest import write_rows

reasoning_gym = pytest.importorskip("reasoning_gym")

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 3},
    "leg_counting": {},
    "countdown": {},  # many answers are right
    "word_sorting": {},
    "knights_knaves": {},
    "sudoku": {},
    "spell_backward": {},  # part of the score for an answer that is nearly right
    "gsm_symbolic": {},
}


def stored(task: str, settings: Mapping[str, Any], index: int = 0, seed: int = 7) -> dict[str, Any]:
    """A problem as it comes out of a file."""
    row: dict[str, Any] = json.loads(json.dumps(make_problem(task, settings, seed=seed, size=4, index=index)))
    return row


@pytest.mark.parametrize("task", TASKS)
def test_answers_get_the_scores_of_the_package(task: str) -> None:
    dataset = reasoning_gym.create_dataset(task, seed=7, size=4, **TASKS[task])
    for index in range(4):
        entry, row = dataset[index], stored(task, TASKS[task], index)
        verifier = Verifier.of_row(row)
        assert verifier is not None
        assert (row["question"], row["answer"]) == (entry["question"], entry["answer"])
        assert verifier.score(entry["answer"]) == 1
        other = dataset[(index + 1) % 4]["answer"]
        for answer in (other, f"{entry['answer']} or so", entry["answer"][:-1], "", "a\nb", "0", "{", "x" * 2000):
            assert verifier.score(answer) == dataset.score_answer(answer, entry), answer


@pytest.mark.parametrize(("task", "wrong"), [("word_sorting", "no words"), ("knights_knaves", "1"), ("chain_sum", "")])
def test_a_wrong_answer_gets_nothing(task: str, wrong: str) -> None:
    problem = Problem("train", 0, "p", "q", "q", "a", Verifier.of_row(stored(task, {})))
    assert problem.score(wrong) == problem.score_completion(wrong) == 0


def test_the_content_of_a_box_is_scored_and_a_completion_by_what_it_names() -> None:
    row = stored("chain_sum", {})
    verifier = Verifier.of_row(row)
    assert verifier is not None
    problem = Problem("train", 0, "p", row["question"], f"{row['question']}\nAnswer:", row["answer"], verifier)
    assert score_answer(rf"so it is \boxed{{{row['answer']}}}", row["answer"], verifier) == 1
    assert problem.is_completed_by(f" First this, then that. The answer is {row['answer']}.")
    assert problem.is_completed_by(f" {row['answer']}\n")
    assert not problem.is_completed_by(" The answer is 123456789.")
    words = Verifier.of_row(stored("sudoku", {}))
    assert words is not None
    several_lines = json.loads(words.entry)["answer"]
    assert "\n" in several_lines
    assert Problem("train", 0, "p", "q", "q", several_lines, words).is_completed_by(f"\n{several_lines}\n")


def test_a_seed_gives_the_same_problems_in_every_process_and_another_seed_others() -> None:
    first = [stored("family_relationships", {}, index) for index in range(3)]
    reasoning_tasks._MAKERS.close()
    assert [stored("family_relationships", {}, index) for index in range(3)] == first
    assert [stored("family_relationships", {}, index, seed=8) for index in range(3)] != first


def test_an_unknown_task_and_a_refused_setting_are_named() -> None:
    require_tasks({"chain_sum": {"max_terms": 3}}, "data.reasoning_gym")
    with pytest.raises(InputError, match=r"data\.reasoning_gym: reasoning-gym has no task 'chain_sums'") as unknown:
        require_tasks({"leg_counting": {}, "chain_sums": {}}, "data.reasoning_gym")
    assert unknown.value.hint == "did you mean 'chain_sum'?"
    for settings in ({"num_terms": 3}, {"seed": 3}, {"min_terms": 9, "max_terms": 2}):
        with pytest.raises(InputError, match=r"data\.reasoning_gym\.chain_sum: the task refuses its settings"):
            require_tasks({"chain_sum": settings}, "data.reasoning_gym")


@pytest.mark.parametrize("task", ["rubiks_cube", "arc_agi"])
def test_problems_without_an_answer_or_that_json_changes_are_refused(task: str) -> None:
    with pytest.raises(JudgeFailed, match="no answer as text, or are scored otherwise once stored as JSON"):
        stored(task, {})


def test_a_problem_that_its_task_cannot_score_is_no_verdict() -> None:
    row = stored("word_sorting", {})
    row["verifier"]["metadata"] = {}
    verifier = Verifier.of_row(row)
    assert verifier is not None
    with pytest.raises(JudgeFailed, match="the task cannot score its own answer"):
        verifier.score("b, a")


def test_a_row_whose_verifier_is_none_is_refused_with_its_place(tmp_path) -> None:
    row = {"id": 1, "prompt": "", **stored("chain_sum", {})}
    write_rows(tmp_path / "p.jsonl", [row])
    (problem,) = read_problems(tmp_path / "p.jsonl", "standard", 9)
    assert problem.verifier == Verifier.of_row(row)
    write_rows(tmp_path / "p.jsonl", [row, row | {"verifier": {"task": "chain_sum"}}])
    with pytest.raises(InputError, match=r"p\.jsonl line 2: verifier is not \{task, metadata\}"):
        read_problems(tmp_path / "p.jsonl", "standard", 9)
