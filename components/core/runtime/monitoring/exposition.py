"""The metrics of a working stage, or of the operator, on a page that Prometheus reads.

The stage appends its events to a file. Each request for the page reads what is new there, so the stage does no work for
it, and the ranks of a training need no connection to it.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client.core import CollectorRegistry, GaugeMetricFamily
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector

from components.core.base.metric_names import (
    CHECKPOINT_TIME,
    GPU_MEMORY,
    GPU_UTILIZATION,
    PREFIX,
    PROGRESS_TIME,
    REPORTED,
    START_TIME,
    STEPS_DONE,
    STEPS_PLANNED,
    STORE_TIME,
    Metric,
)
from components.core.runtime.event_mirror import EventMirror
from components.core.runtime.events import EventFile
from components.core.runtime.monitoring.gpus import gpu_use

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
IN_POD = "KUBERNETES_SERVICE_HOST"
"""Kubernetes gives this variable to every container."""
METRIC_OF = {metric.name.removeprefix(PREFIX): metric for metric in REPORTED}


@contextlib.contextmanager
def served_metrics(port: int, path: Path, run: str, label: str, mirror: EventMirror | None) -> Iterator[None]:
    """Serve the metrics of this attempt at a stage at a port during the block.

    Args:
        port: of the page; where another stage of this machine has it, the stage works without a page.
        path: the stage's file of events; what it has now is of earlier attempts.
        run: the run that the stage belongs to.
        label: the role of the stage in the run.
        mirror: copies the events to the store; None where the store is a folder.
    """
    with served_page(port, StageMetrics(path, run, label, mirror), label):
        yield


@contextlib.contextmanager
def served_page(port: int, metrics: Collector, owner: str) -> Iterator[None]:
    """Serve metrics at a port during the block, outside a pod to this machine alone.

    Args:
        port: of the page; where it is taken, there is no page.
        metrics: are collected anew for each request.
        owner: names in a message what the metrics are of.
    """
    registry = CollectorRegistry()
    registry.register(metrics)
    try:
        server, thread = start_http_server(port, EVERYWHERE if IN_POD in os.environ else LOOPBACK, registry)
    except OSError as error:
        sys.stderr.write(f"Prometheus cannot read the metrics of {owner} at port {port}: {error}\n")
        yield
        return
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class StageMetrics(Collector):
    """The last value of every metric of an attempt at a stage."""

    def __init__(self, path: Path, run: str, label: str, mirror: EventMirror | None = None) -> None:
        self._events = EventFile(path, path.stat().st_size if path.exists() else 0)
        self._run, self._label, self._mirror = run, label, mirror
        self._values: dict[Metric, dict[str, float]] = {}
        """By metric and by the value of its third label, empty where it has two."""
        self._lock = threading.Lock()
        """The page may be read several times at once."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the new events; a family for each metric that has a value."""
        gpus = gpu_use()
        with self._lock:
            for event in self._events.read():
                self._take(event)
            if self._mirror is not None:
                self._values[STORE_TIME] = {"": self._mirror.synced_at}
            self._values[GPU_UTILIZATION] = {gpu.number: gpu.utilization for gpu in gpus}
            self._values[GPU_MEMORY] = {gpu.number: gpu.memory_bytes for gpu in gpus}
            families = [self._family(metric, values) for metric, values in self._values.items()]
        yield from families

    def _take(self, event: Mapping[str, Any]) -> None:
        """Take the values of one event."""
        if event["type"] == "start":
            self._values[START_TIME] = {"": event["time"]}
        elif event["type"] == "progress":
            self._values[PROGRESS_TIME] = {"": event["time"]}
            if "checkpoint" in event:
                self._values[CHECKPOINT_TIME] = {"": event["checkpoint"]}
            steps: dict[Metric, float] = {}
            if event["total"]:  # else the time of a wait, which is no steps
                steps = {STEPS_DONE: event["done"], STEPS_PLANNED: event["total"]}
            metrics = {METRIC_OF[name]: value for name, value in event["metrics"].items() if name in METRIC_OF}
            for metric, value in (steps | metrics).items():
                self._values.setdefault(metric, {})[event["what"]] = value

    def _family(self, metric: Metric, values: Mapping[str, float]) -> GaugeMetricFamily:
        """The values of one metric, with their labels."""
        family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        for third, value in values.items():
            family.add_metric([self._run, self._label, third][: len(metric.labels)], value)
        return family
