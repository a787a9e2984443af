"""The process that runs tasks of reasoning-gym: it lists and checks them, makes problems, and scores answers.

A process of its own, because some tasks take long for some answers or draw from Python's own generator or from sets,
and because the package takes seconds to import.
"""

import functools
import json
import random
import sys
from collections.abc import Mapping
from typing import Any

from components.core.base.config import canonical_json
from components.core.text.judges.worker_pool import RequestFailed, serve

MAX_CACHED_TASKS = 64


def _answer(request: Mapping[str, Any]) -> object:
    """What a worker does with a request."""
    if request["do"] == "list":
        return _task_names()
    task, settings = request["task"], request["settings"]
    if request["do"] == "check":
        _dataset(task, settings, seed=0, size=1)
        return None
    if request["do"] == "make":
        dataset = _dataset(task, settings, seed=request["seed"], size=request["size"])
        return _entry(dataset, request["seed"], request["index"])
    return _score_of_task(_dataset(task, settings, seed=0, size=1), request["answer"], json.loads(request["entry"]))


def _task_names() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


@functools.lru_cache(maxsize=MAX_CACHED_TASKS)
def _dataset(task: str, settings: str, *, seed: int, size: int) -> Any:
    """The task with its settings.

    Raises:
        RequestFailed: it refuses them.
    """
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **json.loads(settings))
    except Exception as error:
        raise RequestFailed(_described(error)) from None


def _entry(dataset: Any, seed: int, index: int) -> dict[str, Any]:
    """A problem that is scored alike before and after it was stored as JSON.

    Raises:
        RequestFailed: it is not.
    """
    random.seed(seed + index)  # for tasks that draw from Python's own generator
    try:
        made = {key: dataset[index][key] for key in ("question", "answer", "metadata")}
        stored = json.loads(canonical_json(made))
        own = [float(dataset.score_answer(made["answer"], entry)) for entry in (made, stored)]
    except Exception as error:
        raise RequestFailed(f"its problems cannot be made, stored as JSON and scored: {_described(error)}") from None
    if not isinstance(made["answer"], str) or not made["answer"].strip() or own[0] != own[1]:
        raise RequestFailed("its problems have no answer as text, or are scored otherwise once stored as JSON")
    return dict(stored)


def _score_of_task(dataset: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """Score of an answer; 0 for one that the task cannot read.

    Raises:
        RequestFailed: the task cannot score the problem's own answer either.
    """
    random.seed(0)
    try:
        return float(dataset.score_answer(answer, entry))
    except MemoryError:
        raise
    except Exception:
        try:
            dataset.score_answer(entry["answer"], entry)
        except Exception as error:
            raise RequestFailed(f"the task cannot score its own answer: {_described(error)}") from None
        return 0.0


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


if __name__ == "__main__":
    serve(float(sys.argv[1]), _answer, prepare=_task_names)
