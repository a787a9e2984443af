"""`tessera operator`: watches the `Retraining` objects of a namespace by kopf, and takes a step of each that changes.

A handler of events alone: it needs no finalizer and no annotation, so an object can be deleted while no operator runs.
kopf's timers need both, so each object has a task of ours, which takes a step at each change and after `RESYNC_S`.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import kopf
from rich.console import Console

from components.core.base.background import repeated
from components.core.base.errors import StageFailed, TesseraError
from components.core.base.kubernetes_api import load_cluster
from components.core.runtime.monitoring.exposition import served_page
from components.core.runtime.stage_command import METRICS_PORT
from pipelines.promotion.platform_settings import OperatorSettings
from pipelines.retraining.cluster import ClusterObjects
from pipelines.retraining.lease import Lease
from pipelines.retraining.metrics import OperatorMetrics
from pipelines.retraining.reconcile import Connections, Outcome, reconcile
from pipelines.retraining.spec import GROUP, PLURAL, VERSION
from pipelines.run.kfp_server import KfpServer
from pipelines.run.submit import Submitter

RESYNC_S = 30
"""Time after which each object takes a step although nothing of it has changed, whole s."""
MAX_STEPS = 32
"""Objects whose steps are taken at the same time; one that waits for a server stops no other."""
LEASE = "tessera-operator"
LOOK_INTERVAL_S = 60.0
"""Time between two looks whether a store is to be measured."""
log = logging.getLogger(__name__)


def run_operator(
    namespace: str,
    kfp: str | None,
    service_account: str | None,
    *,
    queues: bool,
    settings: OperatorSettings,
    liveness_url: str | None = None,
) -> None:
    """Reconcile the objects of a namespace until a signal ends the process.

    Args:
        namespace: of the objects.
        kfp: address of Kubeflow Pipelines; None for the service of the cluster.
        service_account: of the pods of the runs.
        queues: whether Kueue admits the pods.
        settings: repositories of promotions, and the Alertmanager.
        liveness_url: address that answers while the operator is alive.

    Raises:
        ClusterError: there is no cluster, or it refuses.
        StageFailed: another operator has taken over.
    """
    load_cluster()
    lease = Lease(namespace, LEASE, f"{socket.gethostname()}_{os.getpid()}_{uuid.uuid4().hex[:8]}")
    metrics = OperatorMetrics()
    log.info("waiting for the lease %s/%s", namespace, LEASE)
    lease.wait()
    try:
        connections = connect(kfp, service_account, settings, queues=queues)
        registry = _handlers(ObjectTasks(connections, metrics))
        with _served(metrics):
            was_lost = asyncio.run(_operate(lease, registry, namespace, liveness_url))
    finally:
        lease.release()
    if was_lost:
        raise StageFailed("another operator has the lease now, or it could not be renewed")


@contextlib.contextmanager
def _served(metrics: OperatorMetrics) -> Iterator[None]:
    """Let Prometheus read the metrics during the block, where the environment names a port."""
    port = os.environ.get(METRICS_PORT)
    if not port:
        yield
        return
    with served_page(int(port), metrics, "the operator"), repeated(metrics.measure_stores, LOOK_INTERVAL_S):
        yield


async def _operate(lease: Lease, registry: kopf.OperatorRegistry, namespace: str, liveness_url: str | None) -> bool:
    """Run kopf until a signal, or until the lease is lost; returns whether it was.

    The flag is an event of the loop: for one of a thread, kopf waits in a thread that nothing ends.
    """
    ended, lost, loop = threading.Event(), asyncio.Event(), asyncio.get_running_loop()

    def keep() -> None:
        lease.keep(ended)
        if not ended.is_set():
            loop.call_soon_threadsafe(lost.set)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await kopf.operator(
                registry=registry,
                standalone=True,
                namespaces=[namespace],
                liveness_endpoint=liveness_url,
                stop_flag=lost,
            )
    finally:
        ended.set()
        keeper.join()
    return lost.is_set()


def connect(kfp: str | None, service_account: str | None, settings: OperatorSettings, *, queues: bool) -> Connections:
    """The connections of an operator."""

    @functools.cache
    def server(namespace: str) -> KfpServer:
        return KfpServer(kfp, namespace, service_account)

    def submitter(store: str, server: KfpServer, namespace: str) -> Submitter:
        return Submitter(store, server, namespace, queues=queues, console=Console(stderr=True))

    return Connections(ClusterObjects(), server, submitter, settings=settings)


class ObjectTasks:
    """A task for each object, which takes its steps one after another; one that waits for a server stops no other.

    Args:
        connections: how a step reaches the cluster.
        metrics: count the steps.
        resync_s: time after which an object takes a step although nothing of it has changed.
    """

    def __init__(self, connections: Connections, metrics: OperatorMetrics, resync_s: float = RESYNC_S) -> None:
        self._connections, self._metrics, self._resync_s = connections, metrics, resync_s
        self._executor = concurrent.futures.ThreadPoolExecutor(MAX_STEPS)
        self._tasks: dict[str, tuple[asyncio.Event, asyncio.Task[None]]] = {}

    def note_change(self, body: kopf.Body, namespace: str, name: str) -> None:
        """Let an object take a step now. Call it in a handler, whose context lets its task write Kubernetes' events."""
        if name not in self._tasks:
            changed = asyncio.Event()
            self._tasks[name] = changed, asyncio.create_task(self._follow(changed, body, namespace, name))
        self._tasks[name][0].set()

    def forget(self, name: str) -> None:
        """End the task of an object that is gone."""
        if name in self._tasks:
            self._tasks.pop(name)[1].cancel()
        self._metrics.forget(name)

    async def _follow(self, changed: asyncio.Event, body: kopf.Body, namespace: str, name: str) -> None:
        """Take a step at each change, and after a while without one."""
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), self._resync_s)
            changed.clear()
            try:
                outcome = await loop.run_in_executor(
                    self._executor, take_step, self._connections, self._metrics, namespace, name
                )
            except Exception:  # a fault of ours: the next step tries again
                log.exception("%s/%s: a step has failed", namespace, name)
                continue
            for kind, reason, message in () if outcome is None else changed_judgements(outcome):
                kopf.event(body, type=kind, reason=reason, message=message)


def _handlers(tasks: ObjectTasks) -> kopf.OperatorRegistry:
    """What kopf calls."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_via_client(**arguments)

    @kopf.on.startup(registry=registry)
    def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.watching.server_timeout = RESYNC_S  # else a dead connection is never noticed
        settings.scanning.disabled = True  # the definition is there before the operator; to watch it takes more rights
        settings.posting.reporting_component = LEASE

    @kopf.on.event(GROUP, VERSION, PLURAL, id="reconcile", registry=registry)
    async def step(event: kopf.RawEvent, body: kopf.Body, namespace: str | None, name: str, **_: Any) -> None:
        if namespace is None:
            return
        if event["type"] == "DELETED":
            tasks.forget(name)
        else:
            tasks.note_change(body, namespace, name)

    return registry


def take_step(connections: Connections, metrics: OperatorMetrics, namespace: str, name: str) -> Outcome | None:
    """Take the step that an object needs now; None where there is no object, or the API server does not let it."""
    try:
        outcome = reconcile(connections, namespace, name)
    except TesseraError as error:
        log.warning("%s/%s: %s", namespace, name, error)
        metrics.record_error()
        return None
    if outcome is None:
        metrics.forget(name)
    else:
        metrics.record_step(name, outcome)
    return outcome


def changed_judgements(outcome: Outcome) -> list[tuple[str, str, str]]:
    """The events of a step: type, reason and message of each judgement that it has changed."""
    before = {each.type: (each.status, each.reason) for each in outcome.before.conditions}
    return [
        ("Warning" if each.status == "False" and each.type != "Running" else "Normal", each.reason, each.message)
        for each in outcome.after.conditions
        if before.get(each.type) != (each.status, each.reason) and each.message
    ]
