"""An operator that is killed before or after any of its writes, and starts again, neither runs twice nor forgets."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from pipelines.records.runs import run_names, run_record
from pipelines.retraining.spec import NOW
from pipelines.run import submit
from tests.pipelines.retraining.world import World, count_store_writes, step, write_digest


def change(world: World, number: int) -> None:
    """A changed recipe becomes a run that succeeds; the run before is forgotten."""
    world.change_recipe(seed=number)
    step(world)
    world.end()
    step(world)


def wish_after_a_failure(world: World, number: int) -> None:
    """A person asks for another attempt at a run that has failed."""
    kill_at, world.writes.kill_at = world.writes.kill_at, None
    world.change_recipe(seed=number)
    world.step()
    world.end("FAILED")
    world.step()
    world.writes.kill_at, world.writes.done = kill_at, 0
    world.annotate(NOW, str(number))
    step(world)
    world.end()
    step(world)


def end_late_run(world: World, number: int) -> None:
    """A run that takes longer than its budget is ended."""
    kill_at, world.writes.kill_at = world.writes.kill_at, None
    world.change_spec(budget={"wallHours": 1})
    world.now = datetime.now(UTC) + timedelta(hours=2)  # records of runs have the time of this machine
    world.change_recipe(seed=number)
    world.writes.kill_at, world.writes.done = kill_at, 0
    step(world)
    step(world)


@pytest.mark.parametrize(
    ("story", "starts", "outcome"),
    [(change, 1, "Succeeded"), (wish_after_a_failure, 2, "Succeeded"), (end_late_run, 1, "Stopped")],
)
def test_killed_at_every_write_in_turn(
    story: Callable[[World, int], None], starts: int, outcome: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_store_writes(world, monkeypatch)
    monkeypatch.setattr(submit, "compile_pipeline", write_digest)
    world.create(history=1)
    number, num_writes = 0, 0
    while number < max(
        2, 2 * (num_writes + 1)
    ):  # two rounds without a kill, then before and after each write of the second
        before = len(world.started)
        kill_at = number / 2 - 1
        world.writes.done, world.writes.kill_at = 0, kill_at if number > 1 else None
        story(world, number)
        if number == 1:
            num_writes = world.writes.done
        status = world.step()
        where = f"killed at {kill_at} of {num_writes}"
        assert len(world.started) == before + starts, where
        assert len(set(world.started)) == number + 1, where
        assert (status.attempt, status.runs[0].run) == (None, world.started[-1]), where
        assert status.runs[0].state == outcome, where
        assert run_record(world.store, world.started[-1])["status"] in ("succeeded", "interrupted"), where
        assert set(run_names(world.store)) == {each.run for each in status.runs}, where
        number += 1
    assert num_writes >= 7
