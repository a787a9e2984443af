"""MLflow gone, slow, killed and restarted, and deliveries killed: all that a run did arrives, in order, and once."""

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import CorruptArtifact
from components.core.lineage import replay, tracking
from components.core.lineage.mlflow_run import Pipeline
from components.core.lineage.replay import deliver, sync_pending_runs
from components.core.lineage.tracking import LineageError, MlflowUnavailable
from components.core.store.store import Store, open_store
from pipelines.records.runs import artifacts
from tests.components.core.lineage.test_mlflow_run import recorded_run
from tests.components.core.mlflow_records import mlflow_records
from tests.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.mlflow_database import new_database
from tests.mlflow_server import MlflowServer, running_mlflow
from tests.pipelines import made_up_run
from tests.waiting import PATIENCE_S, wait_until

STAGES = ("data", "parent", "sft", "eval", "deploy")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with running_mlflow(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[FaultyProxy]:
    with faulty_proxy(server.uri) as proxy:
        yield proxy


@pytest.fixture
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the recipe and of the registered model, so that each test has its own."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    results = made_up_run.RESULTS["deploy"] | {"registered_model": name}
    monkeypatch.setitem(made_up_run.RESULTS, "deploy", results)
    monkeypatch.setattr(replay, "PAUSE_S", 0.05)
    monkeypatch.setattr(replay, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(tracking, "PROBE_TIMEOUT_S", PATIENCE_S)
    return name


@pytest.fixture
def store(tmp_path: Path, name: str) -> Store:
    """A store with a finished run."""
    store = open_store(tmp_path / "store")
    another_run(store, name, "one")
    return store


def another_run(store: Store, name: str, run: str, **how: Any) -> None:
    """A run of a few stages."""
    recorded_run(store, run, **how)
    for path in store.documents(f"runs/{run}/stages/"):
        if Path(path).stem not in STAGES:
            store.backend.delete(path)
    store.put_document(f"runs/{run}/run.json", store.document(f"runs/{run}/run.json") | {"recipe_name": name})


def assert_delivered_once(store: Store, server: MlflowServer, name: str) -> None:
    """The server holds what an undisturbed delivery leaves in a database of its own, and no more."""
    undisturbed = server.database.with_name("undisturbed.db")
    if not undisturbed.exists():
        new_database(undisturbed)
    for run in sorted({path.split("/")[1] for path in store.documents("runs/")}):
        deliver(store, run, f"sqlite:///{undisturbed}")
    assert mlflow_records(server.database, name, name) == mlflow_records(undisturbed, name, name)


STEPS = {
    "runs/create": 1,
    "logged-models": 1,  # after the search for one
    "runs/log-batch": 3,
    "runs/outputs": 0,
    "model-versions/create": 0,
    "runs/update": 1,
}
"""Requests of a delivery, and how many of them pass before one is spoilt."""


def test_answers_that_are_lost_and_requests_that_are_make_nothing_twice(
    server: MlflowServer, proxy: FaultyProxy, store: Store, name: str, tmp_path: Path
) -> None:
    proxy.faults = [Fault("lose answer", "POST", path, skip=skip) for path, skip in STEPS.items()]
    proxy.faults += [Fault("reset", "POST", path, skip=2) for path in ("runs/create", "logged-models")]
    proxy.faults += [Fault("answer", "POST", "runs/", skip=20, times=2, status=503)]
    deliver(store, "one", proxy.endpoint)
    assert [fault.times for fault in proxy.faults] == [0] * 9
    assert sync_pending_runs(store, proxy.endpoint) == []
    assert_delivered_once(store, server, name)


def test_requests_that_a_slow_server_carries_out_too_late_make_nothing_twice(
    server: MlflowServer, proxy: FaultyProxy, store: Store, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    late = ("runs/create", "logged-models", "model-versions/create")
    proxy.faults = [Fault("late", "POST", path, skip=STEPS[path], after=1.3) for path in late]
    deliver(store, "one", proxy.endpoint)
    assert_delivered_once(store, server, name)


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_delivery_and_restarted_is_waited_for(
    server: MlflowServer, proxy: FaultyProxy, store: Store, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.faults = [Fault("hang", "POST", "runs/outputs", skip=1)]

    def kill_and_restart() -> None:
        wait_for_hang(proxy)
        server.kill()
        proxy.closing.set()
        server.start()

    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    try:
        deliver(store, "one", proxy.endpoint)
    finally:
        killer.join()
    assert_delivered_once(store, server, name)


def _deliver_in_forks(connection: "Connection[int | None, str | None]", uri: str) -> None:
    """Deliver to each address that comes, in a process whose id goes back, and None once it has ended.

    This process has loaded MLflow for all of them. It has no store: the threads of obstore would not be in a fork.
    """
    while (endpoint := connection.recv()) is not None:
        if (pid := os.fork()) == 0:
            deliver(open_store(uri), "one", endpoint)
            os._exit(0)
        connection.send(pid)
        os.waitpid(pid, 0)
        connection.send(None)


def test_a_delivery_killed_at_any_step_is_taken_up_by_the_next(
    server: MlflowServer, store: Store, name: str, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    parent = context.Process(target=_deliver_in_forks, args=(theirs, store.uri), daemon=True)
    parent.start()
    for path, skip in STEPS.items():
        with faulty_proxy(server.uri) as proxy:
            proxy.faults = [Fault("hang", "POST", path, skip=skip)]
            connection.send(proxy.endpoint)
            pid = connection.recv()
            wait_for_hang(proxy)
            os.kill(pid, signal.SIGKILL)
            assert connection.recv() is None
    connection.send(None)
    parent.join()
    assert store.document("runs/one/mlflow.json") is None
    assert sync_pending_runs(store, server.uri) == ["one"]
    assert_delivered_once(store, server, name)


def test_what_a_slow_server_has_not_taken_in_time_is_told_the_next_time(
    server: MlflowServer, proxy: FaultyProxy, store: Store, name: str, tmp_path: Path
) -> None:
    proxy.faults = [Fault("delay", times=999, after=0.1)]
    with pytest.raises(MlflowUnavailable, match=r"MLflow is slow: it has \d+ of the 5 stages of run one"):
        sync_pending_runs(store, proxy.endpoint, within_s=3)
    proxy.faults = []
    assert sync_pending_runs(store, proxy.endpoint) == ["one"]
    assert_delivered_once(store, server, name)


def test_a_server_that_stops_answering_in_the_middle_is_given_up_after_a_while(
    proxy: FaultyProxy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracking, "PROBE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(replay, "PATIENCE_S", 1.0)
    proxy.faults = [Fault("hang", skip=9, times=999)]
    with pytest.raises(LineageError, match=r"took no records: .*timed out"):
        sync_pending_runs(store, proxy.endpoint)
    assert store.document("runs/one/mlflow.json") is None


def test_a_port_that_accepts_and_never_answers_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PROBE_TIMEOUT_S", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(LineageError, match="took no records: timed out"):
            sync_pending_runs(store, f"http://127.0.0.1:{mute.getsockname()[1]}")


def test_runs_arrive_in_the_order_in_which_they_ended_and_one_that_is_refused_keeps_none_back(
    tmp_path: Path, name: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run, finished in (("two", 3.0), ("three", 1.0), ("one", 2.0), ("damaged", 0.5)):
        if run != "one":
            another_run(store, name, run, cached=True)
        record = store.document(f"runs/{run}/run.json")
        store.put_document(f"runs/{run}/run.json", record | {"finished": finished})
    order: list[str] = []
    whole = Pipeline.deliver

    def seen(pipeline: Pipeline) -> None:
        if pipeline.run == "damaged":
            raise CorruptArtifact("a file was changed")
        order.append(pipeline.run)
        whole(pipeline)

    monkeypatch.setattr(Pipeline, "deliver", seen)
    uri = f"sqlite:///{new_database(tmp_path / 'mlflow.db')}"
    with pytest.raises(LineageError, match="run damaged: a file was changed"):
        sync_pending_runs(store, uri)
    assert order == ["three", "one", "two"]


def test_curves_of_stages_that_a_killed_run_finished_are_told_by_the_run_that_went_on(
    tmp_path: Path, name: str
) -> None:
    store = open_store(tmp_path / "store")
    another_run(store, name, "killed")
    for path in store.documents("curves/"):
        store.backend.delete(path)
    store.put_document("runs/killed/run.json", store.document("runs/killed/run.json") | {"status": "running"})
    another_run(store, name, "went-on", cached=True)
    assert store.documents("curves/") == []
    assert sync_pending_runs(store, f"sqlite:///{new_database(tmp_path / 'mlflow.db')}") == ["went-on"]
    metrics = {
        (stage, metric) for stage, _, metric, *_ in mlflow_records(tmp_path / "mlflow.db", name, name)["metrics"]
    }
    assert ("sft", "loss") in metrics


def test_artifacts_that_are_damaged_or_gone_keep_their_place(tmp_path: Path, name: str, store: Store) -> None:
    roles = artifacts(store, "one")
    store.backend.delete(f"artifacts/{roles['chats']}.json")
    store.backend.put(f"artifacts/{roles['parent']}.json", b"{}")
    assert sync_pending_runs(store, f"sqlite:///{new_database(tmp_path / 'mlflow.db')}") == ["one"]
    records = mlflow_records(tmp_path / "mlflow.db", name, name)
    (sft,) = [run for run in records["runs"] if run["name"] == "sft"]
    assert ("chats", roles["chats"][:36], None) in sft["data"]
    assert sft["tags"]["tessera.dev/output.tuned"] == roles["sft"]


def wait_for_hang(proxy: FaultyProxy) -> None:
    """Wait until a request hangs in the proxy."""
    wait_until("a request hangs", lambda: not proxy.faults[0].times, interval_s=0.02)
