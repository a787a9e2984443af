"""Two nodes as two processes of this machine, with the variables that Trainer gives to their pods."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import psutil
import pytest

from components.core.base.errors import ClusterError
from components.core.base.ports import usable_port
from components.core.runtime.context import Interrupted
from components.core.runtime.event_mirror import fetch_events
from components.core.runtime.multi_node import training_node
from components.core.runtime.multi_node.training_node import (
    MAX_MISSED_HEARTBEATS,
    heartbeat_path,
    stopped_without_watcher,
)
from components.core.runtime.placement import Placement
from components.core.runtime.runner import events_path, run_stage
from components.core.runtime.stage_command import command_line
from components.core.store.store import Store, open_store
from components.pretrain.config import STAGE, PretrainConfig
from tests.components.conftest import Recorder
from tests.waiting import PATIENCE_S, wait_until

TWO_NODES = Placement(nodes=2, processes=1, threads=1)
CONFIG = PretrainConfig.parse(
    {
        "shape": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"intermediate_size": 16, "max_position_embeddings": 32},
        "num_steps": 60,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "seq_len": 16,
        "resume_interval_s": 0.01,
        "seed": 0,
    }
)


def node(number: int, port: int, store: Store, inputs: dict[str, str], folder: Path) -> "subprocess.Popen[bytes]":
    """A node with a disk of its own, as a pod has."""
    values = {"config": CONFIG.model_dump_json(), "placement": TWO_NODES.model_dump_json(), "store": store.uri}
    values |= {"run": "run-1", "label": "parent"}
    command = [sys.executable, *command_line("components.pretrain.config:STAGE", values, inputs, {})]
    trainer = {"PET_NNODES": "2", "PET_NODE_RANK": str(number), "PET_MASTER_ADDR": "127.0.0.1"}
    own = {"PET_MASTER_PORT": str(port), "TESSERA_LOCAL": str(folder / f"disk-{number}"), "PYTHONPATH": str(Path.cwd())}
    folder.mkdir(exist_ok=True)
    with (folder / f"log-{number}").open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, **trainer, **own}, stderr=log, start_new_session=True)


@contextlib.contextmanager
def two_nodes(store: Store, inputs: dict[str, str], folder: Path) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Both nodes of one attempt; none outlives the block."""
    port = usable_port(None)
    nodes = [node(number, port, store, inputs, folder) for number in range(2)]
    try:
        yield nodes
    finally:
        for process in nodes:
            kill(process)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """What the loss of a node does: everything on it is gone at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def events(store: Store) -> list[dict[str, object]]:
    """What another machine sees of the stage."""
    fetch_events(store, "run-1")
    path = events_path(store, "run-1", "parent")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_two_nodes_that_lost_one_go_on_and_train_to_the_losses_of_one_process(
    s3_uri: str, tmp_path: Path, tokenizer_folder: Path, sums: Path
) -> None:
    store = open_store(s3_uri, local=tmp_path / "watcher")
    inputs = {
        "tokenizer": store.put_folder(tokenizer_folder, "tokenizer").digest,
        "corpus": store.put_folder(sums, "data").digest,
    }
    with two_nodes(store, inputs, tmp_path / "first") as (first, second):
        wait_until("a checkpoint in the store", lambda: any(store.backend.list("resume/")))
        kill(second)
        assert first.wait(PATIENCE_S) == 1  # so that Trainer starts both again
    assert "\nProcessKilled: pretrain: " in f"\n{(tmp_path / 'first' / 'log-0').read_text()}"
    with two_nodes(store, inputs, tmp_path / "again") as nodes:
        assert [process.wait(PATIENCE_S) for process in nodes] == [0, 0], (tmp_path / "again" / "log-0").read_text()

    seen = events(store)
    (note,) = [str(event["text"]) for event in seen if "goes on from step" in str(event.get("text"))]
    assert int(note.split()[-1]) > 0
    reference, recorder = open_store(tmp_path / "reference"), Recorder()
    digests = {
        "tokenizer": reference.put_folder(tokenizer_folder, "tokenizer").digest,
        "corpus": reference.put_folder(sums, "data").digest,
    }
    alone = run_stage(STAGE, CONFIG, digests, store=reference, placement=Placement(threads=1), reporter=recorder)
    losses = {event["done"]: event["metrics"]["loss"] for event in seen if event["type"] == "progress"}  # type: ignore[index]
    assert [losses[step + 1] for step in range(CONFIG.num_steps)] == pytest.approx(recorder.curve("loss"), abs=1e-5)
    record = store.stage_record(alone.key)
    assert record is not None
    assert record.outputs.keys() == alone.outputs.keys()
    assert list(store.backend.list(f"resume/{alone.key}/")) == []


class Heartbeats:
    """A store in which a watcher writes a heartbeat before each of the first reads."""

    def __init__(self, *beats: int | None) -> None:
        self._beats, self.num_reads = list(beats), 0

    def read_document_or_none(self, path: str) -> dict[str, int] | None:
        assert path == heartbeat_path("run-1", "sft")
        beat = self._beats[min(self.num_reads, len(self._beats) - 1)]
        self.num_reads += 1
        return None if beat is None else {"time": beat}


@pytest.fixture
def sigterm(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Whether this process was asked to stop; heartbeats are read without a pause."""
    monkeypatch.setattr(training_node, "HEARTBEAT_S", 0.001)
    arrived = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.set())
    yield arrived
    signal.signal(signal.SIGTERM, before)


def work_until_stopped(store: Heartbeats, is_done: Callable[[], bool]) -> None:
    """What the first node does while its watcher writes heartbeats."""
    with stopped_without_watcher(cast("Store", store), "run-1", "sft"):
        wait_until("the work is done", is_done)
        raise Interrupted


def test_nodes_stop_when_the_heartbeats_of_their_watcher_end(sigterm: threading.Event) -> None:
    almost_too_many = [1] * MAX_MISSED_HEARTBEATS
    store = Heartbeats(None, None, *almost_too_many, 2)
    with pytest.raises(ClusterError) as caught:
        work_until_stopped(store, sigterm.is_set)
    assert caught.value.exit_code == 2  # with which Trainer starts no node again
    assert store.num_reads == 2 + len(almost_too_many) + 1 + MAX_MISSED_HEARTBEATS


def test_nodes_without_a_watcher_and_those_that_are_stopped_otherwise_go_on_as_ever(sigterm: threading.Event) -> None:
    store = Heartbeats(None)
    with pytest.raises(Interrupted):
        work_until_stopped(store, lambda: store.num_reads > 3 * MAX_MISSED_HEARTBEATS)
    assert not sigterm.is_set()
