"""What Prometheus sees of the operator: the state of each `Retraining`, the budget of its run, the sizes of stores."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from components.core.base.errors import StoreError
from components.core.base.metric_names import (
    OPERATOR_ERRORS,
    RETRAINING_DATASET_TIME,
    RETRAINING_GPU_BUDGET,
    RETRAINING_PHASE,
    RETRAINING_RUN_TIME,
    RETRAINING_STEP_TIME,
    RETRAINING_SUCCESS_TIME,
    RETRAINING_WALL_BUDGET,
    RETRAINING_WANTED_TIME,
    STORE_BYTES,
    Metric,
)
from pipelines.retraining.price import SECONDS_PER_HOUR
from pipelines.retraining.reconcile import Outcome
from pipelines.retraining.status import Phase
from pipelines.run.submit import pod_store

STORE_INTERVAL_S = 3600.0
"""Time after which a store is measured again, s: all its objects are listed."""

Sample = tuple[Metric, tuple[str, ...], float]
"""A metric, the values of its labels, and its value."""


class _Step(NamedTuple):
    """The last step of an object, and when it was taken, Unix time."""

    outcome: Outcome
    time: float


class OperatorMetrics(Collector):
    """Metrics of the objects that the operator takes steps of. Each method may be called by any thread."""

    def __init__(self) -> None:
        self._steps: dict[str, _Step] = {}
        """By the name of the object."""
        self._num_errors = 0
        self._store_bytes: dict[str, int] = {}
        self._measured: dict[str, float] = {}
        """When each store was last measured, by the monotonic clock."""
        self._lock = threading.Lock()

    def record_step(self, name: str, outcome: Outcome) -> None:
        """Take note of a step of an object."""
        with self._lock:
            self._steps[name] = _Step(outcome, time.time())

    def record_error(self) -> None:
        """Take note of a step that ended with an error, of which the object says nothing."""
        with self._lock:
            self._num_errors += 1

    def forget(self, name: str) -> None:
        """Take note that an object is gone."""
        with self._lock:
            self._steps.pop(name, None)

    def measure_stores(self) -> None:
        """Measure the stores of the objects whose sizes are not known, or are old."""
        with self._lock:
            specs = [step.outcome.spec for step in self._steps.values()]
        stores = {spec.store for spec in specs if spec is not None}
        for uri in sorted(stores):
            if time.monotonic() - self._measured.get(uri, float("-inf")) > STORE_INTERVAL_S:
                self._measured[uri] = time.monotonic()
                with contextlib.suppress(StoreError):  # it is measured again in an hour
                    self._store_bytes[uri] = sum(found.size for found in pod_store(uri).backend.list(""))
        for gone in self._store_bytes.keys() - stores:
            del self._store_bytes[gone], self._measured[gone]

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """A family for each metric that has a value."""
        with self._lock:
            steps, num_errors, sizes = dict(self._steps), self._num_errors, dict(self._store_bytes)
        samples = [sample for name, step in steps.items() for sample in _samples(name, step)]
        samples += [(STORE_BYTES, (uri,), float(size)) for uri, size in sizes.items()]
        families: dict[Metric, GaugeMetricFamily] = {}
        for metric, labels, value in samples:
            if metric not in families:
                families[metric] = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            families[metric].add_metric(labels, value)
        yield from families.values()
        yield CounterMetricFamily(OPERATOR_ERRORS.name, OPERATOR_ERRORS.help, value=num_errors)


def _samples(name: str, step: _Step) -> Iterator[Sample]:
    """What is known of one object."""
    status, spec = step.outcome.after, step.outcome.spec
    for phase in get_args(Phase):
        yield RETRAINING_PHASE, (name, phase), float(status.phase == phase)
    yield RETRAINING_STEP_TIME, (name,), step.time
    times = {
        RETRAINING_SUCCESS_TIME: status.last_succeeded,
        RETRAINING_WANTED_TIME: status.wanted_since,
        RETRAINING_DATASET_TIME: None if status.dataset is None else status.dataset.since,
    }
    for metric, moment in times.items():
        if moment is not None:
            yield metric, (name,), moment.timestamp()
    attempt = status.attempt
    if attempt is None or attempt.started is None or spec is None:
        return
    yield RETRAINING_RUN_TIME, (name, attempt.run), attempt.started.timestamp()
    if spec.budget.wall_hours is not None:
        yield RETRAINING_WALL_BUDGET, (name, attempt.run), spec.budget.wall_hours * SECONDS_PER_HOUR
    if spec.budget.gpu_hours is not None:
        yield RETRAINING_GPU_BUDGET, (name, attempt.run), spec.budget.gpu_hours
