"""Accuracy lost by replacing one sub-block: problems that the parent solves and the changed model does not.

Each changed model completes every prompt greedily, and its answers are graded as the evaluation grades a base model's.
Most changed models say what the parent says, or nearly: the parent's completions are checked in one pass, and only what
comes after the first other token is generated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from components.core.base.errors import DataError, InputError
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.layer_files import is_paged
from components.core.runtime.context import Interrupted, StageContext
from components.core.text.embedding_rows import refuse_tokens_without_row
from components.core.text.judges.worker_pool import JudgeFailed
from components.core.text.problems import Problem, problem_prompt_ids, read_problems
from components.core.text.tokenizer import eos_token_id
from components.core.training.greedy_decoding import Tokens, complete, complete_like
from components.search.config import TaskSet
from components.search.scoring.replace_one_block import Replacements
from components.search.space.subblocks import BlockKey, block_name, with_replaced

POINT = "accuracy.json"
WHAT = "accuracy of sub-blocks"

Right = tuple[bool, ...]
"""Which problems were solved."""
Graded = tuple[bool | None, ...]
"""Which problems were solved; None where a completion could not be graded."""


@dataclass(frozen=True)
class Solved:
    """Which problems of a task set were solved.

    Attributes:
        parent: by the parent.
        variants: by the parent with one sub-block replaced.
    """

    parent: Right
    variants: Mapping[BlockKey, Right]


@dataclass(frozen=True)
class Tasks:
    """Problems in the form that a base model completes.

    Attributes:
        problems: what is to be solved.
        prompts: token ids of each prompt.
        tokenizer: makes text of tokens again.
        eos: the end token.
        max_tokens: of an answer.
    """

    problems: Sequence[Problem]
    prompts: Sequence[Tokens]
    tokenizer: Tokenizer
    eos: int
    max_tokens: int

    def graded(self, completions: Sequence[Tokens]) -> Graded:
        """Whether each completion is right."""
        texts = [self.tokenizer.decode(tokens) for tokens in completions]
        return tuple(_is_right(problem, text) for problem, text in zip(self.problems, texts, strict=True))


def load_tasks(config: TaskSet, folder: Path, parent: Path) -> Tasks:
    """The first problems of the validation split.

    Raises:
        DataError: there are none.
    """
    problems = read_problems(folder / "validation.jsonl", "validation", config.num_problems)
    if not problems:
        raise DataError(
            "there are no validation problems to score sub-blocks on",
            hint="give more problems with answers, or set search.task.num_problems to 0",
        )
    tokenizer = Tokenizer.from_file(str(parent / "tokenizer.json"))
    prompts = problem_prompt_ids(parent, problems)
    refuse_tokens_without_row(prompts, parent, "the validation problems")
    return Tasks(problems, prompts, tokenizer, eos_token_id(parent), config.max_tokens)


def _is_right(problem: Problem, text: str) -> bool | None:
    """Whether a completion is right; None where that cannot be decided."""
    try:
        return problem.is_completed_by(text)
    except JudgeFailed:
        return None


@torch.no_grad()
def solve_replaced(
    parent: TesseraForCausalLM, replacements: Replacements, tasks: Tasks, context: StageContext
) -> Solved:
    """Which problems the parent solves, and which it solves with one sub-block replaced, for every variant.

    Args:
        parent: frozen.
        replacements: all variants.
        tasks: what is to be solved.
        context: takes progress, keeps resume points, says when to stop.

    Raises:
        InputError: the parent does not fit into memory.
        Interrupted: the stage was asked to stop; a checkpoint was saved.
    """
    if is_paged(parent.model.layers):
        raise InputError(
            "accuracy is not measured with a parent that is larger than memory: every token would read all of it",
            hint="set search.task.num_problems to 0, or give the stage more placement.memory_gib",
        )
    limits = [tasks.max_tokens] * len(tasks.prompts)
    expected = complete(parent, tasks.prompts, limits, tasks.eos)
    solved = _resumed(context, tasks)
    found = {key: solved[block_name(key)] for key in replacements if block_name(key) in solved}
    for key, block in replacements.items():
        if key not in found:
            model = with_replaced(parent, key, block)
            completions = complete_like(model, tasks.prompts, expected, tasks.max_tokens, tasks.eos)
            found[key] = tasks.graded(completions)
        context.progress(len(found), len(replacements), WHAT)
        if len(found) < len(replacements) and (context.stopping() or context.resume.due()):
            context.resume.save(len(found), lambda folder: _save(folder, found))
            if context.stopping():
                raise Interrupted
    return _solved(tasks, tasks.graded(expected), {key: found[key] for key in replacements}, context)


def _solved(tasks: Tasks, parent: Graded, variants: Mapping[BlockKey, Graded], context: StageContext) -> Solved:
    """What was solved, without the problems on which any model's completion could not be graded."""
    ungraded = [at for at, column in enumerate(zip(parent, *variants.values(), strict=True)) if None in column]
    if len(ungraded) == len(tasks.problems):
        raise DataError("no completion of the task set could be graded", hint="set search.task.num_problems to 0")
    if ungraded:
        context.note(
            f"{len(ungraded)} problems count for no sub-block, because completions of them could not be graded within "
            f"the time limit, such as {tasks.problems[ungraded[0]].id}"
        )

    def counted(graded: Graded) -> Right:
        return tuple(bool(right) for at, right in enumerate(graded) if at not in ungraded)

    return Solved(counted(parent), {key: counted(graded) for key, graded in variants.items()})


def _save(folder: Path, found: Mapping[BlockKey, Graded]) -> None:
    rows = {
        block_name(key): [None if right is None else int(right) for right in rights] for key, rights in found.items()
    }
    (folder / POINT).write_text(json.dumps(rows), encoding="utf-8")


def _resumed(context: StageContext, tasks: Tasks) -> dict[str, Graded]:
    """What the newest resume point has, by name of the variant."""
    point = context.resume.latest()
    if point is None or not (point / POINT).exists():
        return {}
    saved = json.loads((point / POINT).read_text(encoding="utf-8"))
    context.note(f"goes on with the accuracy of {len(saved)} sub-blocks")
    graded = {name: tuple(None if right is None else bool(right) for right in row) for name, row in saved.items()}
    return {name: row for name, row in graded.items() if len(row) == len(tasks.problems)}
