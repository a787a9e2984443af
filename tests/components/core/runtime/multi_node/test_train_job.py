"""The task of a stage of several nodes, against a stand-in of the API server."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.core.runtime.events import EventFile
from components.core.runtime.multi_node import train_job
from components.core.runtime.multi_node.train_job import MANIFEST, job_name
from components.core.runtime.multi_node.training_node import heartbeat_path
from components.core.runtime.runner import events_path, run_stage, stage_key
from components.core.runtime.stage_command import command_line, main
from components.core.store.store import Store, open_store
from tests.components.core.fake_stage import STAGE, FakeConfig, numbers_folder
from tests.components.core.runtime.multi_node.fake_trainer import (
    NAMESPACE,
    FakeTrainer,
    Object,
    end,
    pod,
    running_trainer,
)

RUN, LABEL = "run-1", "fakes"
SKELETON = {"kind": "TrainJob", "metadata": {"labels": {"l": "v"}}, "spec": {"trainer": {"numNodes": 2}}}
OWNER = {"apiVersion": "v1", "kind": "Pod", "name": "task-pod", "uid": "task-uid"}
PLACEMENT = {"nodes": 2, "threads": 1}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def numbers(store: Store, tmp_path: Path) -> str:
    return store.put_folder(numbers_folder(tmp_path / "numbers", 1, 2), "data").digest


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrainer]:
    """The API server, and the environment of the task's pod."""
    monkeypatch.setattr(train_job, "POLL_S", 0.01)
    monkeypatch.setenv(MANIFEST, json.dumps(SKELETON))
    identity = {"NAME": "task-pod", "UID": "task-uid", "NAMESPACE": NAMESPACE}
    for name, value in identity.items():
        monkeypatch.setenv(f"TESSERA_POD_{name}", value)
    with running_trainer(tmp_path) as (fake, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield fake


@pytest.fixture
def task(store: Store, numbers: str, tmp_path: Path) -> list[str]:
    """The command line of the task."""
    values = {"placement": json.dumps(PLACEMENT), "store": store.uri, "run": RUN, "label": LABEL, "retries": "3"}
    outputs = {name: str(tmp_path / "digests" / name) for name in STAGE.outputs}
    return command_line("tests.components.core.fake_stage:STAGE", values, {"numbers": numbers}, outputs)[2:]


def key(numbers: str) -> str:
    return stage_key(STAGE, FakeConfig(), {"numbers": numbers})


def compute(store: Store, numbers: str) -> None:
    """What the first node does."""
    run_stage(STAGE, FakeConfig(), {"numbers": numbers}, store=store, run=RUN, label=LABEL)


def test_a_task_makes_a_train_job_of_its_own_command_and_takes_the_result(
    trainer: FakeTrainer, task: list[str], store: Store, numbers: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer.pods = [pod(0), pod(1)]

    def compute_once(job: Object) -> None:
        assert store.document(heartbeat_path(RUN, LABEL)) is not None
        compute(store, numbers)
        end(job, "Complete")

    trainer.on_read = compute_once
    assert main(task) == 0

    (job,) = trainer.jobs.values()
    assert job["metadata"] == {
        "labels": {"l": "v"},
        "name": job_name(RUN, LABEL, key(numbers)),
        "ownerReferences": [OWNER],
    }
    assert job["spec"]["trainer"]["numNodes"] == 2
    node = [*job["spec"]["trainer"]["command"], *job["spec"]["trainer"]["args"]]
    assert node[1:3] == ["-m", "components.core.runtime.stage_command"]
    assert node[3:] == [
        *("tests.components.core.fake_stage:STAGE", "--config", "{}", "--placement", json.dumps(PLACEMENT)),
        *("--store", store.uri, "--run", RUN, "--label", LABEL, "--input", "numbers", numbers),
    ]
    record = store.stage_record(key(numbers))
    assert record is not None
    assert (tmp_path / "digests" / "total").read_text() == record.outputs["total"]
    assert store.document(f"runs/{RUN}/stages/{LABEL}.json")["cached"] is False
    logged = capfd.readouterr().err
    assert all(f'node {number}: "log of pod-{number}"' in logged for number in (0, 1))


def test_a_result_in_the_store_needs_no_train_job(
    trainer: FakeTrainer, task: list[str], store: Store, numbers: str
) -> None:
    compute(store, numbers)
    assert main(task) == 0
    assert trainer.requests == []
    assert store.document(f"runs/{RUN}/stages/{LABEL}.json")["cached"] is True


def test_an_error_of_a_node_is_that_of_the_task_and_is_not_computed_again(
    trainer: FakeTrainer, task: list[str], store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.pods = [
        pod(0, exit_code=1, message="ProcessKilled: fake: connection closed by peer", at=1),
        pod(1, exit_code=2, message="DataError: row 3 is no number\n  hint: mend row 3", at=2),
    ]
    trainer.on_read = lambda job: end(job, "Failed", "jobset failed")
    for _ in range(2):
        assert main(task) == 2
        assert "DataError: row 3 is no number\n  hint: mend row 3\n" in capsys.readouterr().err
    assert trainer.made("POST") == 1
    event = list(EventFile(events_path(store, RUN, LABEL)).read())[-1]
    assert (event["type"], event["error"], event["hint"]) == ("failed", "row 3 is no number", "mend row 3")


@pytest.mark.parametrize(
    ("pods", "message"),
    [
        ([pod(1, exit_code=137, reason="OOMKilled")], "fakes: node 1 ended with exit code 137 (OOMKilled)"),
        ([], "failed: 4 restarts"),
    ],
)
def test_a_retry_replaces_a_train_job_that_failed_without_an_error_of_ours(
    trainer: FakeTrainer, task: list[str], capsys: pytest.CaptureFixture[str], pods: list[Object], message: str
) -> None:
    trainer.pods = pods
    trainer.on_read = lambda job: end(job, "Failed", "4 restarts")
    for attempt in (1, 2):
        assert main(task) == 1
        error = capsys.readouterr().err
        assert "ProcessKilled: " in error
        assert message in error
        assert trainer.made("POST") == attempt
    assert trainer.made("DELETE") == 1


def test_a_retry_takes_over_a_train_job_that_runs(
    trainer: FakeTrainer, task: list[str], store: Store, numbers: str
) -> None:
    name = job_name(RUN, LABEL, key(numbers))
    trainer.jobs[name] = {"metadata": {"name": name, "ownerReferences": [{**OWNER, "uid": "earlier"}]}}

    def compute_when_owned(job: Object) -> None:
        if job["metadata"]["ownerReferences"] == [OWNER]:
            compute(store, numbers)
            end(job, "Complete")

    trainer.on_read = compute_when_owned
    assert main(task) == 0
    assert (trainer.made("PATCH"), trainer.made("POST"), trainer.made("DELETE")) == (1, 0, 0)


def test_a_train_job_that_is_being_deleted_is_waited_for(
    trainer: FakeTrainer, task: list[str], store: Store, numbers: str
) -> None:
    name = job_name(RUN, LABEL, key(numbers))
    trainer.jobs[name] = {"metadata": {"name": name, "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    reads = iter(range(100))

    def vanish_then_complete(job: Object) -> None:
        if "deletionTimestamp" not in job["metadata"]:
            compute(store, numbers)
            end(job, "Complete")
        elif next(reads) == 2:
            trainer.jobs.clear()
            trainer.jobs["other"] = job
            trainer.refusals.append((404, {"message": "not found"}))

    trainer.on_read = vanish_then_complete
    assert main(task) == 0
    assert (trainer.made("POST"), trainer.made("DELETE"), trainer.made("PATCH")) == (1, 0, 0)


def test_a_task_that_is_ended_deletes_its_train_job(
    trainer: FakeTrainer, task: list[str], store: Store, numbers: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer.on_read = lambda job: os.kill(os.getpid(), signal.SIGTERM)
    assert main(task) == 130
    assert trainer.jobs == {}
    assert trainer.made("DELETE") == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert store.stage_record(key(numbers)) is None


def test_a_server_that_is_away_for_a_while_ends_nothing(
    trainer: FakeTrainer, task: list[str], store: Store, numbers: str
) -> None:
    trainer.refusals = [(503, {"message": "starting"})] * 3

    def complete(job: Object) -> None:
        compute(store, numbers)
        end(job, "Complete")

    trainer.on_read = complete
    assert main(task) == 0


def test_a_refusal_of_the_server_is_told_in_its_words(
    trainer: FakeTrainer, task: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.refusals = [(403, {"message": "task may not get trainjobs"})]
    assert main(task) == 2
    error = capsys.readouterr().err
    assert "ClusterError: fakes: TrainJob fakes-" in error
    assert "403: Forbidden, task may not get trainjobs\n  hint: `tessera cluster check`" in error
    assert trainer.jobs == {}


def test_names_of_train_jobs_leave_room_for_those_of_their_pods() -> None:
    name = job_name("run", "search/a Very Long_label of a stage, longer than a name", "k")
    assert name.startswith("search-a-very-long-label-of-a-")
    assert len(f"{name}-node-0-00-abcde") <= 63
    assert len({job_name(*parts) for parts in (("a", "b", "c"), ("a", "b", "d"), ("b", "b", "c"))}) == 3
