"""Problems of reasoning-gym by split, drawn with a seed of their own for each, and never the same question twice."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from math import ceil

from components.core.base.errors import DataError
from components.core.text.judges.reasoning_tasks import make_problem, require_tasks
from components.core.text.judges.worker_pool import JudgeFailed
from components.core.text.row_files import Row
from components.core.text.toggle import system_message
from components.data.config import DataConfig, ReasoningTask
from components.data.splits import question_digest

KEY = "data.reasoning_gym"
LEAST_DRAWN = 32
"""Problems in a draw at least; where none of them is new, the task has no more."""


def draw_problems(
    config: DataConfig, taken: set[bytes], notes: list[str], progress: Callable[[int, int], None]
) -> list[dict[str, list[Row]]]:
    """Rows of each task by split: train, validation and test-standard.

    What is held out is drawn first, so that no question of it is trained on.

    Args:
        config: how many problems of which tasks.
        taken: hashes of questions that must not be drawn; takes those that are.
        notes: takes a sentence for each split that a task has too few different problems for.
        progress: takes how many problems are drawn, and how many there will be.

    Raises:
        InputError: reasoning-gym is not installed, has no such task, or the task refuses its settings.
        DataError: the problems of a task cannot be used.
    """
    require_tasks({name: task.settings for name, task in config.reasoning_gym.items()}, KEY)
    counts = {name: _counts(task, config) for name, task in config.reasoning_gym.items()}
    total, done = sum(sum(count.values()) for count in counts.values()), 0
    drawn: list[dict[str, list[Row]]] = []
    for name, task in config.reasoning_gym.items():
        splits: dict[str, list[Row]] = {}
        for split, count in counts[name].items():
            rows = splits[split] = _draw(name, task, count, f"{config.seed or 0}/{name}/{split}", taken)
            if len(rows) < count:
                notes.append(f"{KEY}.{name}: {len(rows)} different problems for {split}, not {count}: it has no more")
            done += count
            progress(done, total)
        if not splits["train"]:
            raise DataError(
                f"{KEY}.{name} has no problems to train on beside {sum(map(len, splits.values()))} that are held out",
                hint="leave the task out, or give it settings with which its problems differ",
            )
        drawn.append(splits)
    return drawn


def in_turn(lists: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several lists in turn, so that the first ones are of all of them."""
    return [row for rows in zip_longest(*lists) for row in rows if row is not None]


def answer_chat(problem: Row) -> Row:
    """A chat without thinking: the package gives no steps."""
    user, reply = (
        {"role": role, "content": str(problem[key])} for role, key in (("user", "question"), ("assistant", "answer"))
    )
    return {"messages": [system_message("off"), user, reply], "reasoning": "off"}


def _counts(task: ReasoningTask, config: DataConfig) -> Mapping[str, int]:
    """Problems of each split, in the order in which they are drawn."""
    return {
        "validation": ceil(config.validation_fraction * task.num_train),
        "test-standard": ceil(config.test_fraction * task.num_train),
        "train": task.num_train,
    }


def _draw(name: str, task: ReasoningTask, count: int, series: str, taken: set[bytes]) -> list[Row]:
    """So many problems of different questions, fewer where the task has no more."""
    rows: list[Row] = []
    draws = 0
    while len(rows) < count:
        seed = int.from_bytes(hashlib.sha256(f"{series}/{draws}".encode()).digest()[:4]) >> 1
        size, before = max(LEAST_DRAWN, count - len(rows)), len(rows)
        for index in range(size):
            if len(rows) == count:
                break
            row = _problem(name, task, seed, size, index)
            digest = question_digest(str(row["question"]))
            if digest not in taken:
                taken.add(digest)
                rows.append(row)
        if len(rows) == before:
            break
        draws += 1
    return rows


def _problem(name: str, task: ReasoningTask, seed: int, size: int, index: int) -> Row:
    """A problem as the stages read it."""
    try:
        made = make_problem(name, task.settings, seed=seed, size=size, index=index)
    except JudgeFailed as error:
        raise DataError(f"{KEY}.{name}: {error}", hint="leave the task out") from None
    question = str(made["question"])
    return {
        "id": f"{name}-{hashlib.sha256(question.encode()).hexdigest()[:12]}",
        "question": question,
        "prompt": f"{question}\nAnswer:",
        "answer": made["answer"],
        "level": 0,
        "verifier": made["verifier"],
    }
