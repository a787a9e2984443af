"""A stage of a few lines that adds numbers up, and can fail, stop or wait: what the platform does shows on it."""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from components.core.base.config import Config
from components.core.base.errors import DataError
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.stage import Input, Output, Stage

HOLD = "FAKE_STAGE_HOLD"
"""Environment variable with the path of a file that `hold_at` wrote."""


class FakeConfig(Config):
    """How to add."""

    factor: int = 1
    """What every number is multiplied by."""
    shard: str | None = None
    """Item of a fan-out; says nothing here."""
    fail: Literal["data", "bug", "system", "crash"] | None = None
    """How to fail, if at all."""


STAGE = Stage(
    name="fake",
    config=FakeConfig,
    inputs={
        "numbers": Input("data", "a file numbers.json, a list of integers"),
        "more": Input("data", "further lists", optional=True, many=True),
    },
    outputs={"total": Output("table", "total.json"), "nothing": Output("table", "stays empty")},
    entry="tests.components.core.fake_stage:run",
    doc="Add numbers up.",
    source="none",
)


def run(
    config: FakeConfig, *, context: StageContext, out: Path, numbers: Path, more: list[Path] | None = None
) -> dict[str, JsonValue]:
    """One number a step, a resume point after each."""
    if config.fail == "data":
        raise DataError("row 3 is no number", hint="mend row 3")
    if config.fail == "bug":
        raise ZeroDivisionError("division by zero")
    if config.fail == "system":
        raise OSError(28, "No space left on device")
    if config.fail == "crash":
        os.abort()
    values = [value for folder in (numbers, *(more or [])) for value in read(folder)]
    point = context.resume.latest()
    first, total = (0, 0) if point is None else json.loads((point / "state.json").read_text())
    if context.placement.processes > 1:
        import torch.distributed  # which would slow the start of those that run alone

        torch.distributed.barrier()  # as a training loop does: no rank goes on, and drops points, before all have read
    for step in range(first, len(values)):
        _wait_where_held(step, context)
        if context.stopping():
            raise Interrupted
        total += config.factor * values[step]
        context.progress(step + 1, len(values), sum=total)
        if context.rank == 0:
            context.resume.save(step + 1, partial(save, [step + 1, total]))
    if context.rank == 0:
        (out / "total" / "total.json").write_text(json.dumps(total))
    return {"total": total}


def hold_at(path: Path, done: int, processes: int = 1) -> Callable[[], bool]:
    """Have each process of the stage wait once, when that many steps are done, until it is stopped or the file is gone.

    Returns:
        Whether all of them wait.
    """
    path.write_text(str(done))
    waiting = [_note_of(path, rank) for rank in range(processes)]
    for note in waiting:
        note.unlink(missing_ok=True)
    return lambda: all(note.exists() for note in waiting)


def _wait_where_held(done: int, context: StageContext) -> None:
    path = Path(os.environ.get(HOLD, os.devnull))
    if not path.is_file() or done != int(path.read_text()) or _note_of(path, context.rank).exists():
        return
    _note_of(path, context.rank).touch()
    while path.exists() and not context.stopping():
        time.sleep(0.01)


def _note_of(path: Path, rank: int) -> Path:
    """The file by which a process says that it waits, or has waited."""
    return path.with_name(f"{path.name}.rank-{rank}")


def read(folder: Path) -> list[int]:
    """The numbers of a folder."""
    values: list[int] = json.loads((folder / "numbers.json").read_text())
    return values


def save(state: list[int], point: Path) -> None:
    """Write a resume point: steps done, and the sum so far."""
    (point / "state.json").write_text(json.dumps(state))


def numbers_folder(folder: Path, *values: int) -> Path:
    """A folder that the stage can read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "numbers.json").write_text(json.dumps(values))
    return folder
