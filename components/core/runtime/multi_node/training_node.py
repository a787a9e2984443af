"""What a pod of a `TrainJob` does differently from the only pod of a stage.

The first node computes the stage as a single pod does: it reports events, copies checkpoints to the store and records
the outputs. The other nodes only run their ranks. The first node also stops when nobody watches the `TrainJob`, because
a task that Kubeflow Pipelines ends may be killed before it can delete its `TrainJob`.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from components.core.base.config import Config
from components.core.base.errors import ClusterError, StoreError
from components.core.base.scratch_dir import scratch_dir
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.events import NullReporter
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.runtime.runner import (
    Digests,
    fetch_and_work,
    load_verified_record,
    select_shard_inputs,
    stage_key,
    stop_signals,
)
from components.core.runtime.stage import Stage
from components.core.store.store import Store

HEARTBEAT_S = 20.0
"""Time between two heartbeats of the task that watches a `TrainJob`."""
MAX_MISSED_HEARTBEATS = 15
"""How often in a row the first node may find no new heartbeat; then the nodes stop."""


def heartbeat_path(run: str, label: str) -> str:
    """Document that the watcher of a `TrainJob` writes again and again."""
    return f"runs/{run}/heartbeats/{label}.json"


def run_other_node(stage: Stage, config: Config, inputs: Digests, *, store: Store, placement: Placement) -> None:
    """Run the ranks of a node that is not the first, until the stage is done.

    Raises:
        TesseraError: what a rank raised; `ProcessKilled` if they failed in another way.
        Interrupted: SIGTERM arrived, and all ranks have stopped.
    """
    inputs = select_shard_inputs(stage, config, inputs)
    key = stage_key(stage, config, inputs)
    if load_verified_record(store, key, stage) is not None:  # the first node failed after it had recorded the result
        return
    folder = scratch_dir(store.local / "tmp", f"{stage.name}-{key[:16]}-node")
    with stop_signals() as stopping, folder as scratch, contextlib.closing(stopping):
        context = StageContext(NullReporter(), Resume(store.resume_folder(key)), scratch, placement, stopping=stopping)
        fetch_and_work(stage, config, inputs, key, store, context)


@contextlib.contextmanager
def stopped_without_watcher(store: Store, run: str, label: str) -> Iterator[None]:
    """Stop this process with a checkpoint when the heartbeats of the watcher have ended; without any, nobody watches.

    Raises:
        ClusterError: they have ended. Its exit code lets Trainer end the `TrainJob`, and not start the nodes again.
    """
    ended, is_abandoned = threading.Event(), threading.Event()

    def watch() -> None:
        newest, num_missed = None, 0
        while num_missed < MAX_MISSED_HEARTBEATS:
            if ended.wait(HEARTBEAT_S):
                return
            heartbeat = newest
            with contextlib.suppress(StoreError):
                heartbeat = store.read_document_or_none(heartbeat_path(run, label))
            num_missed = num_missed + 1 if newest is not None and heartbeat in (None, newest) else 0
            newest = heartbeat or newest
        is_abandoned.set()
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except Interrupted:
        if not is_abandoned.is_set():
            raise
        raise ClusterError(
            "the task that watches this training has ended", hint="submit the recipe again: it goes on from here"
        ) from None
    finally:
        ended.set()
        watcher.join()
