"""The process that sends the metrics of a working stage to MLflow.

    python -m components.core.lineage.live_metrics STORE RUN LABEL OFFSET   (started by `stage_command`)

It follows the stage's file of events from OFFSET on, where this attempt begins. The file is the queue: while MLflow
does not answer, metrics wait there; at the next contact the last steps that MLflow has say where to continue. A line on
standard input says that the stage has ended. The sender is a process of its own, so that the import of MLflow, its
threads and a server that hangs neither slow nor break the stage.
"""

import os
import signal
import sys
import threading
import time

from components.core.base.errors import TesseraError
from components.core.base.processes import on_exit_of
from components.core.lineage.curves import events_of_key, points_of_events
from components.core.lineage.pipeline_runs import Attempt, PipelineRuns, RunMetrics, last_attempt
from components.core.lineage.replay import ENDED, forget_lost_database
from components.core.lineage.tracking import LineageError, lineage_lock, mlflow_errors, tracking
from components.core.runtime.events import EventFile
from components.core.runtime.runner import events_path
from components.core.runtime.stage_command import TRACKING_URI
from components.core.store.store import Store, open_store

INTERVAL_S = 1.0
"""Time between two batches."""
MAX_PAUSE_S = 15.0
"""Longest time between two attempts to reach MLflow."""
FLUSH_S = 5.0
"""Longest time that the end of a stage waits for the last batch."""
NICENESS = 5
"""Below the stage's priority, though not the lowest: a busy stage would starve the import of MLflow."""


class RunEnded(Exception):
    """The run has ended, and its delivery with it: no further MLflow run may be created."""


class LiveMetrics:
    """Sends the metrics of one attempt at a stage, and how the attempt ended."""

    def __init__(self, store: Store, run: str, label: str, offset: int, tracking_uri: str) -> None:
        self._store, self._run, self._tracking_uri = store, run, tracking_uri
        self._path, self._offset = events_path(store, run, label), offset
        self._stage_ended = threading.Event()
        self._disconnect()

    def send_until_end(self) -> None:
        """Send batches until the stage has ended; where MLflow does not answer, try again less and less often."""
        pause, reported = INTERVAL_S, ""
        while True:
            ended = self._stage_ended.wait(pause)
            if ended and pause > INTERVAL_S:
                return  # MLflow did not answer last time; the delivery of the run sends the rest
            try:
                self._send(ended)
                pause = INTERVAL_S
            except RunEnded:
                return
            except TesseraError as error:
                self._disconnect()
                pause = min(2 * pause, MAX_PAUSE_S)
                if error.message != reported:
                    reported = error.message
                    sys.stderr.write(f"metrics wait in {self._path}: {error.message}\n")
            if ended:
                return

    def end(self) -> bool:
        """Take note that the stage has ended; returns whether the last batch is worth waiting for."""
        self._stage_ended.set()
        attempt = last_attempt(EventFile(self._path, self._offset).read())
        return self._stage_run is not None or (attempt is not None and attempt.status == "FAILED")

    def _disconnect(self) -> None:
        """Forget what was read and sent: at the next contact the file and MLflow's last steps say where to continue."""
        self._events = EventFile(self._path, self._offset)
        self._attempt: Attempt | None = None
        self._stage_run: _StageRun | None = None

    def _send(self, ended: bool) -> None:
        """Send what is new; there is no contact with MLflow before the first metric, or the error of a failed stage.

        Raises:
            LineageError: MLflow does not answer, or refuses.
            RunEnded: it is too late to create the MLflow run.
        """
        events = list(self._events.read())
        points = list(points_of_events(events))
        attempt = self._attempt = last_attempt(events, self._attempt)
        if attempt is None or (self._stage_run is None and not points and attempt.status != "FAILED"):
            return
        if self._stage_run is None:
            stage_run = _StageRun(self._store, self._run, attempt, self._tracking_uri)
            earlier = EventFile(self._path).read(until=self._offset)
            points = [*points_of_events(events_of_key(earlier, attempt.key)), *points]
            self._stage_run = stage_run
        with mlflow_errors(self._tracking_uri):
            self._stage_run.metrics.log(points)
            if ended:
                self._stage_run.end(attempt)


class _StageRun:
    """The MLflow run of a stage, found or created, and marked as running."""

    def __init__(self, store: Store, run: str, attempt: Attempt, tracking_uri: str) -> None:
        with lineage_lock(store):  # against other stages of the run, and against its delivery
            forget_lost_database(store, tracking_uri)
            record = store.document(f"runs/{run}/run.json")
            if record is None:
                raise LineageError(f"there is no record of run {run} in {store.uri}")
            if record["status"] in ENDED:
                raise RunEnded
            with tracking(tracking_uri) as client:
                self._runs = PipelineRuns(client, store, record, tracking_uri)
                self._run = self._runs.stage(attempt.stage, attempt.label, attempt.key, attempt.started)
                self._runs.reopen(self._runs.pipeline)
                self._runs.reopen(self._run)
                self.metrics = RunMetrics(client, self._run)

    def end(self, attempt: Attempt) -> None:
        """Mark the run as ended, and that of the pipeline with it where the stage did not succeed."""
        status = "KILLED" if attempt.status == "RUNNING" else attempt.status  # killed stages report no end
        ended = attempt.ended or time.time()
        self._runs.end(self._run, status, ended, attempt.error)
        if status != "FINISHED":
            self._runs.end(self._runs.pipeline, status, ended)


def main(store_uri: str, run: str, label: str, offset: str) -> None:
    """Send the metrics of a stage until a line on standard input, its end, or the end of the parent process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the stage may save a checkpoint first, and reports until it ends
    os.nice(NICENESS)
    live = LiveMetrics(open_store(store_uri), run, label, int(offset), os.environ[TRACKING_URI])
    sender = threading.Thread(target=live.send_until_end, daemon=True)
    sender.start()

    def flush_and_exit() -> None:
        if live.end():
            sender.join(FLUSH_S)
        os._exit(0)  # without waiting for a request that hangs

    on_exit_of(os.getppid(), flush_and_exit)  # a child of a killed stage may hold standard input open
    sys.stdin.readline()
    flush_and_exit()


if __name__ == "__main__":
    main(*sys.argv[1:])
