"""The test problems."""

from pathlib import Path

from components.core.base.errors import DataError
from components.core.text.problems import Problem, read_problems

SPLITS = ("standard", "hard")


def load_problems(folder: Path, limit: int) -> list[Problem]:
    """Read the first `limit` problems of each split that exists.

    Raises:
        DataError: there are none, or a row lacks a field.
    """
    found = [problem for split in SPLITS for problem in read_problems(folder / f"test-{split}.jsonl", split, limit)]
    if not found:
        raise DataError("there are no test problems", hint="give the recipe `rl:` problems with answers")
    return found
