"""Metrics reach MLflow while the stage works, with the server up, killed and restarted, or away all the time."""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from components.core.lineage import live_metrics
from components.core.lineage.live_metrics import LiveMetrics
from components.core.lineage.replay import sync_pending_runs
from components.core.runtime.events import EventFile, Events
from components.core.runtime.runner import events_path
from components.core.store.store import Store, open_store
from pipelines.records.run_lock import mark_dead_runs_killed
from pipelines.records.runs import run_record
from tests.components.core.lineage.paced_run import ERROR, LABEL, loss, run_paced, say
from tests.components.core.lineage.test_mlflow_run import recorded_run
from tests.faulty_proxy import Fault, faulty_proxy
from tests.mlflow_database import new_database
from tests.mlflow_server import MlflowServer, running_mlflow
from tests.waiting import PATIENCE_S, wait_until

"""Ends a test that hangs; nothing is measured."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with running_mlflow(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


class PacedRun:
    """A local run of the paced stage in a process of its own, and what MLflow shows of it."""

    def __init__(self, folder: Path, name: str, uri: str) -> None:
        self.store, self.name = open_store(folder / "store"), name
        self.words = folder / "words"
        self.client = MlflowClient(uri, registry_uri=uri)

    def begin(self) -> None:
        """Start the run, or continue it."""
        arguments = (self.store.uri, self.name, str(self.words))
        self.process: SpawnProcess = multiprocessing.get_context("spawn").Process(target=run_paced, args=arguments)
        self.process.start()

    def end(self) -> None:
        """Wait for its end."""
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None

    def stage_process(self) -> psutil.Process:
        """The process of the stage."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "components.core.runtime.stage_command" in child.cmdline())

    def reported(self) -> list[int]:
        """Steps that the stage has reported to its file."""
        events = EventFile(events_path(self.store, self.name, LABEL)).read()
        return [event["done"] for event in events if event["type"] == "progress"]

    def runs(self) -> dict[str, Any]:
        """MLflow's runs by name; each is there once."""
        experiment = self.client.get_experiment_by_name("paced")
        where = f"tags.`tessera.dev/run` = '{self.name}'"
        found = self.client.search_runs([experiment.experiment_id], where) if experiment else []
        assert len({run.info.run_name for run in found}) == len(found)
        return {run.info.run_name: run for run in found}

    def steps(self) -> list[int]:
        """Steps of the loss in MLflow, in its order; the values are those of the stage."""
        run = self.runs().get(LABEL)
        history = self.client.get_metric_history(run.info.run_id, "loss") if run else []
        assert [point.value for point in history] == [loss(point.step) for point in history]
        return [point.step for point in history]

    def status(self) -> str | None:
        """MLflow's status of the stage."""
        run = self.runs().get(LABEL)
        return run.info.status if run else None


@pytest.fixture
def paced(server: MlflowServer, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: Any) -> Iterator[PacedRun]:
    """A run that has not begun; it is ended with the test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run = PacedRun(tmp_path, request.node.name[:60].strip("_"), server.uri)
    try:
        yield run
    finally:
        with contextlib.suppress(AttributeError):
            run.process.terminate()
            run.process.join(PATIENCE_S)


def test_the_loss_moves_while_the_stage_works_and_a_server_that_was_killed_gets_what_it_missed(
    paced: PacedRun, server: MlflowServer
) -> None:
    say(paced.words, 1, 2)
    paced.begin()
    wait_until("metrics in MLflow", lambda: paced.steps() == [1, 2])
    assert {run.info.status for run in paced.runs().values()} == {"RUNNING"}

    server.kill()
    say(paced.words, 3, 4)
    wait_until("metrics in MLflow", lambda: paced.reported() == [1, 2, 3, 4])
    server.start()
    wait_until("metrics in MLflow", lambda: paced.steps() == [1, 2, 3, 4])
    assert paced.process.is_alive()

    say(paced.words, 5)
    paced.end()
    assert sync_pending_runs(paced.store, server.uri) == [paced.name]
    assert paced.steps() == [1, 2, 3, 4, 5]
    assert {run.info.status for run in paced.runs().values()} == {"FINISHED"}
    assert paced.runs()[LABEL].data.metrics["result/loss"] == loss(5)


def test_a_server_that_is_away_all_the_time_costs_the_stage_nothing_and_gets_all_later(
    paced: PacedRun, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        say(paced.words, 1, 2, 3, 4, 5)
        paced.begin()
        paced.end()
    assert paced.process.exitcode == 0
    assert paced.runs() == {}
    assert sync_pending_runs(paced.store, server.uri) == [paced.name]
    assert (paced.status(), paced.steps()) == ("FINISHED", [1, 2, 3, 4, 5])


def test_a_failed_stage_says_why_and_continues_its_own_run(paced: PacedRun, server: MlflowServer) -> None:
    say(paced.words, 1)
    say(paced.words, 2, word="fail")
    paced.begin()
    paced.end()
    assert sync_pending_runs(paced.store, server.uri) == [paced.name]
    assert {run.info.status for run in paced.runs().values()} == {"FAILED"}
    assert paced.runs()[LABEL].data.tags["tessera.dev/error"] == ERROR
    assert paced.steps() == [1]

    say(paced.words, 2, 3)
    paced.begin()
    wait_until("metrics in MLflow", lambda: paced.steps() == [1, 2, 3])
    assert {run.info.status for run in paced.runs().values()} == {"RUNNING"}
    assert "tessera.dev/error" not in paced.runs()[LABEL].data.tags
    say(paced.words, 4, 5)
    paced.end()
    assert sync_pending_runs(paced.store, server.uri) == [paced.name]
    assert {run.info.status for run in paced.runs().values()} == {"FINISHED"}
    assert paced.steps() == [1, 2, 3, 4, 5]


def test_a_stage_that_is_stopped_or_killed_is_marked_with_its_run(paced: PacedRun, server: MlflowServer) -> None:
    say(paced.words, 1)
    paced.begin()
    wait_until("metrics in MLflow", lambda: paced.steps() == [1])
    paced.process.terminate()
    paced.end()
    assert sync_pending_runs(paced.store, server.uri) == [paced.name]
    assert {run.info.status for run in paced.runs().values()} == {"KILLED"}

    say(paced.words, 2)
    paced.begin()
    wait_until("metrics in MLflow", lambda: paced.steps() == [1, 2])
    assert paced.status() == "RUNNING"
    paced.stage_process().kill()
    paced.end()
    assert run_record(paced.store, paced.name)["status"] == "failed"
    assert sync_pending_runs(paced.store, server.uri) == [paced.name]
    assert paced.status() == "FAILED"
    assert paced.steps() == [1, 2]


def test_a_run_whose_command_was_killed_is_marked_as_killed_with_its_stage(
    paced: PacedRun, server: MlflowServer
) -> None:
    say(paced.words, 1)
    paced.begin()
    wait_until("metrics in MLflow", lambda: paced.steps() == [1])
    stage = paced.stage_process()
    assert paced.process.pid is not None
    stage.suspend()  # so that it cannot report its end
    os.kill(paced.process.pid, signal.SIGKILL)
    paced.end()
    os.killpg(stage.pid, signal.SIGKILL)
    assert mark_dead_runs_killed(paced.store) == [paced.name]
    assert sync_pending_runs(paced.store, server.uri) == [paced.name]
    assert {run.info.status for run in paced.runs().values()} == {"KILLED"}


# Below, the sender runs in this process.


def begin_stage(store: Store, run: str, status: str = "running") -> Events:
    """The record of a run, and the events of a stage of it that has begun."""
    record = {"run": run, "recipe_name": "paced", "recipe": {}, "started": 1.0, "finished": None, "status": status}
    store.put_document(f"runs/{run}/run.json", {**record, "sources": {}, "recipe_digest": "0"})
    events = Events(events_path(store, run, LABEL))
    events.emit({"type": "start", "time": 2.0, "stage": "paced", "label": LABEL, "key": "k" * 64})
    return events


def emit(events: Events, *steps: int) -> None:
    for step in steps:
        event = {"type": "progress", "time": 2.0 + step, "done": step, "total": 9, "what": ""}
        events.emit({**event, "metrics": {"loss": loss(step)}})


def send_all(store: Store, run: str, uri: str, offset: int = 0) -> None:
    """Send what the events hold, as at the end of a stage."""
    live = LiveMetrics(store, run, LABEL, offset, uri)
    live.end()
    live.send_until_end()


@pytest.mark.parametrize(
    ("event", "status", "error"),
    [
        ({"type": "failed", "error": f"{ERROR}\nsecond line"}, "FAILED", ERROR),
        ({"type": "interrupted"}, "KILLED", None),
        ({"type": "finish"}, "FINISHED", None),
        ({"type": "note"}, "KILLED", None),  # it did not report its end
    ],
)
def test_the_sender_marks_how_the_stage_ended_and_the_next_attempt_as_running(
    server: MlflowServer, tmp_path: Path, event: dict[str, Any], status: str, error: str | None
) -> None:
    run = PacedRun(tmp_path, f"ends-{event['type']}", server.uri)
    events = begin_stage(run.store, run.name)
    emit(events, 1)
    events.emit({**event, "time": 4.0})
    send_all(run.store, run.name, server.uri)
    stage = run.runs()[LABEL]
    assert (stage.info.status, stage.data.tags.get("tessera.dev/error")) == (status, error)
    assert run.runs()[run.name].info.status == ("RUNNING" if status == "FINISHED" else status)

    offset = events_path(run.store, run.name, LABEL).stat().st_size
    emit(begin_stage(run.store, run.name), 2)
    live = LiveMetrics(run.store, run.name, LABEL, offset, server.uri)
    sender = threading.Thread(target=live.send_until_end)
    sender.start()
    wait_until("metrics in MLflow", lambda: run.steps() == [1, 2])
    stage = run.runs()[LABEL]
    assert (stage.info.status, stage.data.tags.get("tessera.dev/error")) == ("RUNNING", None)
    assert run.runs()[run.name].info.status == "RUNNING"
    live.end()
    sender.join()


def test_a_batch_whose_answer_was_lost_is_there_once(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_metrics, "INTERVAL_S", 0.05)
    run = PacedRun(tmp_path, "lost-answer", server.uri)
    events = begin_stage(run.store, run.name)
    with faulty_proxy(server.uri) as proxy:
        proxy.faults = [Fault("lose answer", "POST", path) for path in ("runs/create", "runs/log-batch")]
        proxy.faults += [Fault("answer", "POST", "runs/log-batch", status=503)]
        live = LiveMetrics(run.store, run.name, LABEL, 0, proxy.endpoint)
        sender = threading.Thread(target=live.send_until_end)
        sender.start()
        emit(events, 1, 2, 3)
        wait_until("metrics in MLflow", lambda: run.steps() == [1, 2, 3])
        emit(events, 4)
        wait_until("metrics in MLflow", lambda: run.steps() == [1, 2, 3, 4])
        live.end()
        sender.join()
    assert [fault.times for fault in proxy.faults] == [0, 0, 0]


def test_steps_that_a_resumed_stage_repeats_stay_as_they_were_sent_first(server: MlflowServer, tmp_path: Path) -> None:
    run = PacedRun(tmp_path, "resumed", server.uri)
    emit(begin_stage(run.store, run.name), 1, 2, 3)
    path = events_path(run.store, run.name, LABEL)
    send_all(run.store, run.name, server.uri)
    assert (run.status(), run.steps()) == ("KILLED", [1, 2, 3])  # it did not report its end

    offset = path.stat().st_size
    emit(begin_stage(run.store, run.name), 2, 3, 4)
    send_all(run.store, run.name, server.uri, offset)
    assert run.steps() == [1, 2, 3, 4]


def test_what_an_earlier_attempt_could_not_send_comes_first(server: MlflowServer, tmp_path: Path) -> None:
    run = PacedRun(tmp_path, "earlier", server.uri)
    emit(begin_stage(run.store, run.name), 1, 2)
    offset = events_path(run.store, run.name, LABEL).stat().st_size
    emit(begin_stage(run.store, run.name), 3)
    send_all(run.store, run.name, server.uri, offset)
    assert run.steps() == [1, 2, 3]


def test_no_run_is_created_after_its_run_was_delivered(tmp_path: Path) -> None:
    uri = f"sqlite:///{new_database(tmp_path / 'mlflow.db')}"
    run = PacedRun(tmp_path, "late", uri)
    emit(begin_stage(run.store, run.name, status="killed"), 1)
    send_all(run.store, run.name, uri)
    assert run.runs() == {}


def test_a_new_database_gets_the_runs_that_the_lost_one_had(tmp_path: Path) -> None:
    uri, store = f"sqlite:///{tmp_path / 'mlflow.db'}", open_store(tmp_path / "store")
    recorded_run(store, "demo-1")
    record = run_record(store, "demo-1")
    receipt = {"tracking_uri": uri, "finished": record["finished"], "status": record["status"]}
    store.put_document("runs/demo-1/mlflow.json", receipt)  # of a database that is not there any more

    emit(begin_stage(store, "paced-1"), 1)
    send_all(store, "paced-1", uri)
    assert PacedRun(tmp_path, "paced-1", uri).steps() == [1]
    assert sync_pending_runs(store, uri) == ["demo-1"]
