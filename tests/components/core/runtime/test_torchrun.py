"""Training processes: why they failed reaches the user, and none outlives the stage that they work for."""

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from components.core.base import errors
from components.core.base import fault_injection as faults
from components.core.base.errors import DataError, ProcessKilled, StageFailed, TesseraError
from components.core.runtime import torchrun
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.events import NullReporter
from components.core.runtime.placement import Placement
from components.core.runtime.rank_main import _agree_on_checkpoint
from components.core.runtime.resume import Resume
from components.core.runtime.runner import INTERRUPTED_EXIT_CODE, run_stage, stage_key
from components.core.runtime.torchrun import (
    LOGS,
    MAX_RESTARTS,
    NODE_RANK,
    _failure,
    _topology,
    node_rank,
    rank_environment,
)
from components.core.store.store import open_store
from tests.chaos.processes import living_with
from tests.components.conftest import Recorder
from tests.components.core.fake_stage import HOLD, STAGE, FakeConfig, hold_at, numbers_folder, save
from tests.waiting import PATIENCE_S, wait_until

TWO = Placement(processes=2, threads=1)
NUM_STEPS = 10
RESTARTS = "TEST_TORCHRUN_RESTARTS"
"""Environment variable of the stage in a process of its own."""


def test_an_error_of_ours_keeps_kind_hint_and_exit_code_and_is_not_restarted(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    numbers = store.put_folder(numbers_folder(tmp_path / "numbers", 1), "data").digest
    recorder = Recorder()
    with pytest.raises(DataError, match=r"^row 3 is no number\n  hint: mend row 3$") as caught:
        run_stage(STAGE, FakeConfig(fail="data"), {"numbers": numbers}, store=store, placement=TWO, reporter=recorder)
    assert caught.value.exit_code == 2
    assert recorder.notes == []


@pytest.mark.parametrize(
    ("exceptions", "raised", "message"),
    [
        (["RuntimeError: peer", "InputError: bad"], errors.InputError, "bad"),
        (["KeyError: first", "ValueError: later"], StageFailed, "process 0 stopped: KeyError: first"),
        (["Exception: no error of ours"], StageFailed, "Exception: no error of ours"),
        ([], ProcessKilled, "fake: a process was killed\n  hint: torchrun ended with status -9"),
    ],
)
def test_the_cause_is_an_error_of_ours_or_what_was_raised_first(
    tmp_path: Path, exceptions: list[str], raised: type[BaseException], message: str
) -> None:
    attempt = tmp_path / LOGS / "run" / "attempt_0"
    attempt.mkdir(parents=True)
    for rank, text in enumerate(exceptions):
        (attempt / str(rank)).mkdir()
        error_file = attempt / str(rank) / "error.json"
        error_file.write_text(json.dumps({"message": {"message": text, "extraInfo": {"timestamp": "1"}}}))
        os.utime(error_file, ns=(0, rank))
    error = _failure(STAGE, _context(tmp_path), -9)

    assert type(error) is raised
    assert message in str(error)
    assert type(_failure(STAGE, _context(tmp_path, stopping=True), -9)) is Interrupted


def test_exceptions_on_one_of_several_nodes_may_mean_that_another_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NODE_RANK, "1")
    for name, text in (("0", "RuntimeError: connection closed by peer"), ("1", "DataError: row 3 is no number")):
        folder = tmp_path / LOGS / "run" / "attempt_0" / name
        folder.mkdir(parents=True)
        (folder / "error.json").write_text(json.dumps({"message": {"message": text}}))
        expected = {"0": ProcessKilled, "1": DataError}[name]
        assert type(_failure(STAGE, _context(tmp_path), 1)) is expected


def test_the_ranks_of_all_nodes_run_on_one_machine_and_those_of_one_in_a_pod_of_a_train_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placement = Placement(nodes=3, processes=2)
    assert placement.num_ranks == 6
    assert _topology(placement) == ["--standalone", "--nproc-per-node=6", f"--max-restarts={MAX_RESTARTS}"]
    for rank in ("0", "2"):
        monkeypatch.setenv(NODE_RANK, rank)
        assert node_rank() == int(rank)
        assert _topology(placement) == ["--nproc-per-node=2", "--max-restarts=0"]


def test_ranks_that_share_cores_wait_without_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    environment = {**rank_environment(TWO), "OMP_DISPLAY_ENV": "TRUE"}
    shown = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown.stderr  # as the OpenMP that PyTorch loads understands it
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert rank_environment(TWO)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_rank_that_has_its_node_to_itself_waits_as_openmp_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv(NODE_RANK, "1")
    assert "OMP_WAIT_POLICY" not in rank_environment(Placement(nodes=2, processes=1))
    assert rank_environment(Placement(nodes=2, processes=2))["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("can_download", [True, False])
def test_every_node_resumes_from_the_checkpoint_of_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_download: bool
) -> None:
    first, second, shared = Resume(tmp_path / "first"), Resume(tmp_path / "second"), HashStore()
    first.save(7, partial(save, [7, 1]))
    second.save(6, partial(save, [6, 1]))

    def agree(node: int, local_rank: int, resume: Resume, download: object = None) -> None:
        places = {"RANK": 2 * node + local_rank, "GROUP_RANK": node, "LOCAL_RANK": local_rank}
        for name, value in places.items():
            monkeypatch.setenv(name, str(value))
        assert download is None or callable(download)
        _agree_on_checkpoint(PrefixStore("attempt_0", shared), resume, download or pytest.fail)

    def download() -> None:
        if can_download:
            second.save(7, partial(save, [7, 1]))

    agree(0, 0, first)
    agree(0, 1, first)
    if can_download:
        agree(1, 0, second, download)
        agree(1, 1, second)
        assert [point.name for point in second.points()] == ["000000007"]
        return
    for local_rank in (0, 1):
        with pytest.raises(
            RuntimeError, match=r"node 1 has checkpoint 000000006, and the first node resumes from 0{8}7$"
        ):
            agree(1, local_rank, second, download)


def test_an_exception_is_followed_by_restarts_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "MAX_RESTARTS", 1)
    store = open_store(tmp_path / "store")
    numbers = store.put_folder(numbers_folder(tmp_path / "numbers", 1), "data").digest
    recorder = Recorder()
    with pytest.raises(StageFailed, match=r"fake: process \d stopped: ZeroDivisionError: division by zero\n  hint: "):
        run_stage(STAGE, FakeConfig(fail="bug"), {"numbers": numbers}, store=store, placement=TWO, reporter=recorder)
    assert len(recorder.notes) == 1


def test_resume_points_of_ranks_reach_a_remote_store(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_uri, local=tmp_path / "here")
    inputs = {"numbers": store.put_folder(numbers_folder(tmp_path / "numbers", 1, 2), "data").digest}
    monkeypatch.setattr(torchrun, "MAX_RESTARTS", 1)
    monkeypatch.setenv(faults.VARIABLE, "mirror.list=kill")  # in rank 0 alone, at the first checkpoint of each start
    with pytest.raises(StageFailed, match="a process was killed"):
        run_stage(STAGE, FakeConfig(), inputs, store=store, placement=TWO)
    folder = open_store(s3_uri, local=tmp_path / "elsewhere").resume_folder(stage_key(STAGE, FakeConfig(), inputs))
    point = Resume(folder).latest()
    assert point is not None
    assert json.loads((point / "state.json").read_text()) == [2, 3]


@pytest.mark.parametrize("victim", ["stage", "torchrun", "rank.begun", "rank.computed"])
def test_one_that_is_killed_takes_the_others_along_and_the_next_attempt_goes_on(tmp_path: Path, victim: str) -> None:
    marker = uuid.uuid4().hex
    at_point = {faults.VARIABLE: f"{victim}=kill", HOLD: os.devnull} if "." in victim else {}
    stage, events, is_held = _held_stage(tmp_path, MARKER=marker, **at_point)
    if not at_point:
        wait_until("two steps", is_held)
        os.kill({"stage": stage.pid, "torchrun": _children(stage.pid)[0]}[victim], signal.SIGKILL)
    stage.wait(PATIENCE_S)
    wait_until("no process is left", lambda: not living_with("MARKER", marker))

    assert stage.returncode == (-signal.SIGKILL if victim == "stage" else 1)
    outputs = _run(tmp_path, FakeConfig())
    assert outputs == _run(tmp_path / "whole", FakeConfig())
    steps = [json.loads(line).get("done") for line in events.read_text().splitlines()]
    assert steps.count(1) == 1


def test_ranks_restart_from_the_last_checkpoint_however_one_crashes(tmp_path: Path) -> None:
    stage, events, is_held = _held_stage(tmp_path, **{RESTARTS: "3"})
    for crash, next_hold in ((signal.SIGABRT, 4), (signal.SIGSEGV, 6), (signal.SIGKILL, NUM_STEPS + 1)):
        wait_until("both ranks wait", is_held)
        is_held = hold_at(tmp_path / "hold", next_hold, processes=2)
        os.kill(_children(_children(stage.pid)[0])[1], crash)
    assert stage.wait(PATIENCE_S) == 0
    reported = [json.loads(line) for line in events.read_text().splitlines()]
    notes = [event["text"] for event in reported if event["type"] == "note"]
    crashed = r"process 1 crashed \(Fatal Python error: .*\)"
    for note, how in zip(notes, (crashed, crashed, "a process was killed"), strict=True):
        assert re.fullmatch(f"{how}; all processes start again from the last checkpoint", note)
    assert [event.get("done") for event in reported].count(1) == 1
    assert "fake_stage.py" in (tmp_path / "log").read_text()  # where it was
    assert _run(tmp_path, FakeConfig()) == _run(tmp_path / "whole", FakeConfig())


def test_ctrl_c_saves_a_checkpoint_and_ends_with_130(tmp_path: Path) -> None:
    marker = uuid.uuid4().hex
    stage, events, is_held = _held_stage(tmp_path, MARKER=marker)
    wait_until("two steps", is_held)
    stage.send_signal(signal.SIGINT)
    assert stage.wait(PATIENCE_S) == INTERRUPTED_EXIT_CODE
    wait_until("no process is left", lambda: not living_with("MARKER", marker))
    reported = [json.loads(line) for line in events.read_text().splitlines()]
    assert reported[-1]["type"] == "interrupted"
    assert "note" not in {event["type"] for event in reported}
    assert _run(tmp_path, FakeConfig()) == _run(tmp_path / "whole", FakeConfig())
    steps = [json.loads(line).get("done") for line in events.read_text().splitlines()]
    assert steps.count(1) == 1


def test_a_stage_that_crashes_each_time_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "MAX_RESTARTS", 1)
    store = open_store(tmp_path / "store")
    numbers = store.put_folder(numbers_folder(tmp_path / "numbers", 1), "data").digest
    with pytest.raises(StageFailed, match=r"fake: process 0 crashed \(Fatal Python error: Aborted\)\n  hint: "):
        run_stage(STAGE, FakeConfig(fail="crash"), {"numbers": numbers}, store=store, placement=TWO)


def _context(folder: Path, stopping: bool = False) -> StageContext:
    return StageContext(NullReporter(), Resume(folder / "resume"), folder, stopping=lambda: stopping)


def _held_stage(folder: Path, **environment: str) -> tuple["subprocess.Popen[bytes]", Path, Callable[[], bool]]:
    """The stage as two ranks, which wait after two steps, in a process of its own that writes to `log`.

    Returns:
        The process, the file of its events, and whether both ranks wait and the file has their steps.
    """
    is_held = hold_at(folder / "hold", 2, processes=2)
    settled = {"PYTHONPATH": str(Path.cwd()), HOLD: str(folder / "hold"), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        stage = subprocess.Popen(
            [sys.executable, __file__, str(folder)], env={**os.environ, **settled, **environment}, stderr=log
        )
    events = folder / "store" / "local" / "runs" / "run-1" / "fake.jsonl"
    return stage, events, lambda: is_held() and '"done": 2' in events.read_text()


def _run(folder: Path, config: FakeConfig, **options: object) -> dict[str, str]:
    """The stage, as a run has it."""
    store = open_store(folder / "store")
    numbers = store.put_folder(numbers_folder(folder / "numbers", *range(NUM_STEPS)), "data").digest
    placement = options.get("placement", Placement(threads=1))
    assert isinstance(placement, Placement)
    return run_stage(STAGE, config, {"numbers": numbers}, store=store, run="run-1", placement=placement).outputs


def _children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


if __name__ == "__main__":
    torchrun.MAX_RESTARTS = int(os.environ.get(RESTARTS, "0"))  # as many as a test needs; each takes seconds
    try:
        _run(Path(sys.argv[1]), FakeConfig(), placement=TWO)
    except TesseraError:
        sys.exit(1)
    except Interrupted:
        sys.exit(INTERRUPTED_EXIT_CODE)
