"""Accuracy with one sub-block replaced, against whole models that answer one problem at a time, token by token."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from components.core.base.errors import DataError, InputError
from components.core.model.checkpoint import load_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import Interrupted, StageContext, quiet_context
from components.core.text.judges.worker_pool import JudgeFailed
from components.core.text.problems import completed_answer
from components.core.text.verifier import verify
from components.search.config import MEASURES, TaskSet
from components.search.scoring.replace_one_block import Replacements, Scores
from components.search.scoring.task_accuracy import Tasks, load_tasks, solve_replaced
from components.search.space.subblocks import BlockKey, Subblock
from components.search.stages.scores_step import shard_scores
from tests.components.search.scoring.test_replace_one_block import VARIANTS, replacement_for, whole_child

TASK = TaskSet(num_problems=8, max_tokens=5)
QUESTIONS = ["1+2=", "3*4=", "7-5=", "9+9=", "2*2=", "8-1=", "6+0=", "5*5=", "4-4="]


@pytest.fixture
def replacements(parent: TesseraForCausalLM) -> dict[BlockKey, Subblock | None]:
    return {(layer, variant): replacement_for(parent, layer, variant) for layer, variant in VARIANTS if layer in (0, 2)}


@torch.no_grad()
def said(model: TesseraForCausalLM, tokenizer: Tokenizer, prompt: str) -> str:
    ids = tokenizer.encode(prompt).ids
    found: list[int] = []
    while len(found) < TASK.max_tokens and 0 not in found:
        found.append(int(model(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return str(tokenizer.decode(found))


@pytest.fixture
def problems(tmp_path: Path, parent: TesseraForCausalLM, parent_folder: Path) -> Path:
    """What the parent itself answers, but to each fourth question something else."""
    tokenizer = Tokenizer.from_file(str(parent_folder / "tokenizer.json"))
    folder = tmp_path / "problems"
    folder.mkdir()
    with (folder / "validation.jsonl").open("w") as stream:
        for number, question in enumerate(QUESTIONS):
            answer = "another" if number % 4 == 3 else completed_answer(said(parent, tokenizer, question))
            stream.write(
                json.dumps({"id": str(number), "question": question, "prompt": question, "answer": answer}) + "\n"
            )
    return folder


@pytest.fixture
def tasks(problems: Path, parent_folder: Path) -> Tasks:
    return load_tasks(TASK, problems, parent_folder)


def test_answers_are_those_of_whole_models(
    parent: TesseraForCausalLM, replacements: Replacements, tasks: Tasks, context: StageContext
) -> None:
    solved = solve_replaced(parent, replacements, tasks, context)
    assert solved.parent == (True, True, True, False) * 2
    for key, block in replacements.items():
        child = whole_child(parent, key, block)
        answers = [said(child, tasks.tokenizer, problem.prompt) for problem in tasks.problems]
        assert solved.variants[key] == tuple(
            verify(completed_answer(answer), problem.answer)
            for answer, problem in zip(answers, tasks.problems, strict=True)
        ), key
    assert len(set(solved.variants.values())) > 1


def test_the_parents_weights_are_left_alone(
    parent: TesseraForCausalLM, replacements: Replacements, tasks: Tasks, context: StageContext
) -> None:
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    solve_replaced(parent, replacements, tasks, context)
    assert all(torch.equal(value, before[name]) for name, value in parent.state_dict().items())


def test_what_is_lost_has_its_mean_and_standard_error(
    parent: TesseraForCausalLM, replacements: Replacements, tasks: Tasks, context: StageContext
) -> None:
    solved = solve_replaced(parent, replacements, tasks, context)
    text = Scores(MEASURES, torch.tensor([3, 4]), {key: torch.rand(2, 4, dtype=torch.float64) for key in replacements})
    table = shard_scores(text, solved)
    assert table.parent_accuracy == 0.75
    for block, right in zip(table.blocks, solved.variants.values(), strict=True):
        lost = torch.tensor(solved.parent).double() - torch.tensor(right).double()
        assert block.accuracy == pytest.approx(float(lost.mean()))
        assert block.errors["accuracy"] == pytest.approx(float(lost.std() / len(lost) ** 0.5))
        assert block.row_sums["accuracy"] == tuple(lost.tolist())
        assert block.of("accuracy") == block.accuracy


def test_an_interrupted_measurement_goes_on_to_the_same(
    parent: TesseraForCausalLM, replacements: Replacements, tasks: Tasks, tmp_path: Path
) -> None:
    whole = solve_replaced(parent, replacements, tasks, quiet_context(tmp_path / "a"))
    context = quiet_context(tmp_path / "b")
    asked = iter([False, False, True])
    context.stopping = lambda: next(asked, True)
    with pytest.raises(Interrupted):
        solve_replaced(parent, replacements, tasks, context)
    context.stopping = lambda: False
    left = {key: None if number < 3 else block for number, (key, block) in enumerate(replacements.items())}
    assert solve_replaced(parent, left, tasks, context) == whole  # the first three were not asked again


def test_a_problem_that_cannot_be_graded_counts_for_no_model(
    parent: TesseraForCausalLM,
    replacements: Replacements,
    tasks: Tasks,
    context: StageContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = solve_replaced(parent, replacements, tasks, context)
    answers = [problem.answer for problem in tasks.problems]

    def judge(answer: str, expected: str) -> bool:
        if expected == answers[1]:
            raise JudgeFailed("comparing takes more than 5 s of processor time")
        return verify(answer, expected)

    monkeypatch.setattr("components.core.text.problems.verify", judge)
    solved = solve_replaced(parent, replacements, tasks, context)
    counted = [at for at, answer in enumerate(answers) if answer != answers[1]]
    assert solved.parent == tuple(whole.parent[at] for at in counted)
    assert solved.variants == {key: tuple(row[at] for at in counted) for key, row in whole.variants.items()}


def test_without_problems_or_memory_it_is_refused(
    parent_folder: Path, replacements: Replacements, tasks: Tasks, problems: Path, context: StageContext
) -> None:
    with pytest.raises(InputError, match="larger than memory"):
        solve_replaced(load_model(parent_folder, paged=True), replacements, tasks, context)
    shutil.move(problems / "validation.jsonl", problems / "train.jsonl")
    with pytest.raises(DataError, match="no validation problems"):
        load_tasks(TASK, problems, parent_folder)
