"""Training processes: why they failed reaches the user, and none outlives the stage that they work for."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from components.core.base import errors
from components.core.base import fault_injection as faults
from components.core.base.errors import DataError, StageFailed, TesseraError
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.events import NullReporter
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.runtime.runner import run_stage, stage_key
from components.core.runtime.torchrun import FAILURE, _failure
from components.core.store.store import open_store
from tests.chaos.processes import living_with
from tests.components.core.fake_stage import STAGE, FakeConfig, numbers_folder

TWO = Placement(processes=2, threads=1)
PATIENCE_S = 60.0


def test_what_a_rank_refuses_is_told_with_its_hint(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    numbers = store.put_folder(numbers_folder(tmp_path / "numbers", 1), "data").digest
    with pytest.raises(DataError, match=r"row 3 is no number\n  hint: mend row 3") as caught:
        run_stage(STAGE, FakeConfig(fail="data"), {"numbers": numbers}, store=store, placement=TWO)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("told", "raised", "message"),
    [
        ([("RuntimeError", "peer", None, 1.0), ("InputError", "bad", 2, 2.0)], errors.InputError, "bad"),
        ([("ValueError", "later", None, 2.0), ("KeyError", "first", None, 1.0)], StageFailed, "KeyError: first"),
        ([("Interrupted", "", None, 2.0), ("RuntimeError", "peer", None, 1.0)], StageFailed, "RuntimeError: peer"),
        ([("Interrupted", "", None, 2.0)], StageFailed, "a training process was killed"),
        ([("Exception", "no error of ours", None, 1.0)], StageFailed, "Exception: no error of ours"),
        ([], StageFailed, "a training process was killed, and said nothing; torchrun ended with status -9"),
    ],
)
def test_the_rank_that_knows_why_is_believed(
    tmp_path: Path, told: list[tuple[str, str, int | None, float]], raised: type[BaseException], message: str
) -> None:
    for rank, (kind, text, exit_code, at) in enumerate(told):
        failure = {"type": kind, "message": text, "hint": None, "exit_code": exit_code, "time": at}
        (tmp_path / FAILURE.format(rank)).write_text(json.dumps(failure))
    error = _failure(STAGE, StageContext(NullReporter(), Resume(tmp_path / "resume"), tmp_path), -9)

    assert type(error) is raised
    assert message in str(error)
    stopping = _failure(
        STAGE, StageContext(NullReporter(), Resume(tmp_path / "resume"), tmp_path, stopping=lambda: True), -9
    )
    assert type(stopping) is Interrupted


def test_resume_points_of_ranks_reach_a_remote_store(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_uri, local=tmp_path / "here")
    inputs = {"numbers": store.put_folder(numbers_folder(tmp_path / "numbers", 1, 2, 4), "data").digest}
    monkeypatch.setenv(faults.VARIABLE, "mirror.list:3=kill")  # rank 0 alone comes there
    with pytest.raises(StageFailed, match="a training process was killed"):
        run_stage(STAGE, FakeConfig(), inputs, store=store, placement=TWO)
    folder = open_store(s3_uri, local=tmp_path / "elsewhere").resume_folder(stage_key(STAGE, FakeConfig(), inputs))
    point = Resume(folder).latest()
    assert point is not None
    assert json.loads((point / "state.json").read_text()) == [3, 7]


@pytest.mark.parametrize("victim", ["stage", "torchrun", "rank", "rank.begun", "rank.computed"])
def test_one_that_is_killed_takes_the_others_along_and_the_next_attempt_goes_on(tmp_path: Path, victim: str) -> None:
    marker = uuid.uuid4().hex
    at_point = {faults.VARIABLE: f"{victim}=kill"} if "." in victim else {}
    stage, events = _slow_stage(tmp_path, MARKER=marker, **at_point)
    if not at_point:
        _wait(lambda: events.exists() and '"done": 2' in events.read_text())
        torchrun = _children(stage.pid)[0]
        os.kill({"stage": stage.pid, "torchrun": torchrun, "rank": _children(torchrun)[1]}[victim], signal.SIGKILL)
    stage.wait(PATIENCE_S)
    _wait(lambda: not living_with("MARKER", marker))

    assert stage.returncode == (-signal.SIGKILL if victim == "stage" else 1)
    outputs = _run(tmp_path, FakeConfig())
    assert outputs == _run(tmp_path / "whole", FakeConfig())
    steps = [json.loads(line).get("done") for line in events.read_text().splitlines()]
    assert steps.count(1) == 1


@pytest.mark.parametrize("crash", [signal.SIGABRT, signal.SIGSEGV])
def test_ranks_start_again_from_the_last_point_when_one_crashes(tmp_path: Path, crash: signal.Signals) -> None:
    stage, events = _slow_stage(tmp_path)
    _wait(lambda: events.exists() and '"done": 2' in events.read_text())
    os.kill(_children(_children(stage.pid)[0])[1], crash)
    assert stage.wait(2 * PATIENCE_S) == 0
    told = [json.loads(line) for line in events.read_text().splitlines()]
    (note,) = [event["text"] for event in told if event["type"] == "note"]
    assert re.fullmatch(r"training process 1 crashed \(Fatal Python error: .*\); they start again .*", note)
    assert [event.get("done") for event in told].count(1) == 1
    assert "fake_stage.py" in (tmp_path / "log").read_text()  # where it was
    assert _run(tmp_path, FakeConfig()) == _run(tmp_path / "whole", FakeConfig())


def test_a_stage_that_crashes_each_time_fails(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    numbers = store.put_folder(numbers_folder(tmp_path / "numbers", 1), "data").digest
    with pytest.raises(
        StageFailed, match=r"fake: training process 0 crashed \(Fatal Python error: Aborted\)\n  hint: "
    ):
        run_stage(STAGE, FakeConfig(fail="crash"), {"numbers": numbers}, store=store, placement=TWO)


def _slow_stage(folder: Path, **environment: str) -> tuple["subprocess.Popen[bytes]", Path]:
    """The stage as two ranks, in a process of its own that writes to `log`, and the file of its events."""
    settled = {"PYTHONPATH": str(Path.cwd()), "FAKE_STAGE_PACE_S": "0.2", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        stage = subprocess.Popen(
            [sys.executable, __file__, str(folder)], env={**os.environ, **settled, **environment}, stderr=log
        )
    return stage, folder / "store" / "local" / "runs" / "run-1" / "fake.jsonl"


def _run(folder: Path, config: FakeConfig, **options: object) -> dict[str, str]:
    """The stage, as a run has it."""
    store = open_store(folder / "store")
    numbers = store.put_folder(numbers_folder(folder / "numbers", *range(40)), "data").digest
    placement = options.get("placement", Placement(threads=1))
    assert isinstance(placement, Placement)
    return run_stage(STAGE, config, {"numbers": numbers}, store=store, run="run-1", placement=placement).outputs


def _children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _wait(until: object) -> None:
    """Wait for something to become true."""
    assert callable(until)
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


if __name__ == "__main__":
    try:
        _run(Path(sys.argv[1]), FakeConfig(), placement=TWO)
    except TesseraError:
        sys.exit(1)
