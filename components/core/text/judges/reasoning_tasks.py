"""Problems and verifiers of reasoning-gym by the name of a task; see `reasoning_process.py` for where its code runs.

The package makes problems without a network, from a seed, and scores an answer from 0 to 1: some tasks give a part of
the score to an answer that is nearly right. A problem is stored with what its task needs to score an answer, so that
whoever has the row can do it.

Source: arXiv 2505.24760.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from components.core.base.config import canonical_json
from components.core.base.errors import InputError, MissingPackage
from components.core.base.suggestions import nearest
from components.core.text.judges.worker_pool import JudgeFailed, WorkerPool
from components.core.text.row_files import Row

PROGRAM = "components.core.text.judges.reasoning_process"
MAKING_LIMIT_S = 120.0
"""Processor time in which one problem has to be made, seconds."""
MAX_CACHED_SCORES = 1 << 14

_SCORERS = WorkerPool(PROGRAM, "scoring")
_MAKERS = WorkerPool(PROGRAM, "making a problem", MAKING_LIMIT_S)


@dataclass(frozen=True)
class Verifier:
    """Scores the answers to one problem.

    Attributes:
        task: name of the task.
        settings: of the task, where they are not its defaults; JSON.
        entry: the problem as the task made it, {question, answer, metadata}; JSON.
    """

    task: str
    settings: str
    entry: str

    @classmethod
    def of_row(cls, row: Row) -> "Verifier | None":
        """The verifier that a problem's row names; None where it names none.

        Raises:
            ValueError: `verifier` is not {task, metadata}, with the task's settings where it has some.
            MissingPackage: reasoning-gym is not installed.
        """
        named = row.get("verifier")
        if named is None:
            return None
        if not isinstance(named, dict) or not isinstance(named.get("task"), str) or "metadata" not in named:
            raise ValueError("verifier is not {task, metadata}")
        _require_package("a problem with a verifier")
        entry = {"question": row["question"], "answer": row["answer"], "metadata": named["metadata"]}
        return cls(named["task"], canonical_json(named.get("settings", {})), canonical_json(entry))

    def score(self, answer: str) -> float:
        """Score of an answer, 0 to 1, as the task gives it.

        Raises:
            JudgeFailed: the task cannot score answers to this problem, or takes too long for this one.
        """
        return _score(self, answer)


@functools.lru_cache(maxsize=MAX_CACHED_SCORES)
def _score(verifier: Verifier, answer: str) -> float:
    """Models give the same answer many times."""
    request = {"do": "score", "task": verifier.task, "settings": verifier.settings, "answer": answer}
    return float(_SCORERS.ask({**request, "entry": verifier.entry}, f"an answer of {verifier.task}, {answer[:80]!r}"))


def require_tasks(wanted: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Check that there are these tasks, and that each takes its settings.

    Args:
        wanted: settings by name of the task.
        where: key of the recipe that names them.

    Raises:
        MissingPackage: reasoning-gym is not installed.
        InputError: a task is unknown, or refuses a setting.
    """
    _require_package(where)
    known = _MAKERS.ask({"do": "list"}, "the names of the tasks")
    for task, settings in wanted.items():
        if task not in known:
            raise InputError(f"{where}: reasoning-gym has no task {task!r}", hint=nearest(task, known))
        try:
            _MAKERS.ask({"do": "check", "task": task, "settings": canonical_json(settings)}, task)
        except JudgeFailed as error:
            raise InputError(
                f"{where}.{task}: the task refuses its settings {canonical_json(settings)}: {error}",
                hint="its settings are the fields of its configuration in reasoning-gym",
            ) from None


@functools.cache
def _require_package(what: str) -> None:
    """Raise MissingPackage unless reasoning-gym is installed."""
    if find_spec("reasoning_gym") is None:
        raise MissingPackage(
            f"{what} needs reasoning-gym, which is not installed",
            hint="pip install 'tessera[reasoning]', which takes a C compiler and Python's headers",
        )


def make_problem(task: str, settings: Mapping[str, Any], *, seed: int, size: int, index: int) -> Row:
    """A problem of a task as a row {question, answer, verifier}; the same arguments give the same problem.

    Args:
        task: its name.
        settings: where they are not its defaults.
        seed: of a series of problems.
        size: of the series.
        index: of the problem in the series.

    Raises:
        JudgeFailed: the task failed or took too long, or its problems cannot be stored as JSON.
    """
    request = {"do": "make", "task": task, "settings": canonical_json(settings)}
    entry = _MAKERS.ask({**request, "seed": seed, "size": size, "index": index}, f"problem {index} of {task}")
    verifier: Row = {"task": task, "metadata": entry["metadata"]}
    if settings:
        verifier["settings"] = dict(settings)
    return {"question": entry["question"], "answer": entry["answer"], "verifier": verifier}
