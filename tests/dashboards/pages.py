"""Pages that Prometheus reads: of stages and the operator, by their own code; of vLLM and Kueue, by declaration."""

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from components.core.base.background import repeated
from components.core.base.metric_names import PERPLEXITY, PREFIX, Metric
from components.core.base.ports import usable_port
from components.core.runtime.context import StageContext, quiet_context
from components.core.runtime.event_mirror import EventMirror
from components.core.runtime.events import Events
from components.core.runtime.monitoring.exposition import served_metrics, served_page
from components.core.store.store import Store, open_object_store, open_store
from pipelines.retraining.kopf_operator import take_step
from pipelines.retraining.metrics import OperatorMetrics
from tests.pipelines.retraining.world import NAME, NAMESPACE, World
from tests.pipelines.run.fake_kfp import running_kfp
from tests.reported_metrics import REPORTED_BY

PACE_S = 0.5
LABEL_VALUES = {
    "name": ("tessera-serving-nano",),
    "status": ("2xx", "5xx"),
    "finished_reason": ("stop", "length", "error"),
}
"""Values of labels whose value counts; others have their own name."""


@contextlib.contextmanager
def stage_pages(folder: Path, run: str) -> Iterator[list[int]]:
    """Pages of every stage of a run, at work: a step, sometimes a checkpoint, again and again. Yields the ports."""
    with contextlib.ExitStack() as stack:
        contexts: dict[tuple[str, str], StageContext] = {}
        ports: list[int] = []
        for label, phase in REPORTED_BY:
            place = folder / label.replace("/", ".")
            path = place / "events.jsonl"
            contexts[label, phase] = context = quiet_context(place)
            context.reporter = Events(path)
            mirror = EventMirror(open_store(folder / "store"), path, f"runs/{run}/events/x")
            ports.append(usable_port(None))
            stack.enter_context(served_metrics(ports[-1], path, run, label, mirror))
            stack.enter_context(repeated(mirror.copy, PACE_S))
            context.reporter.emit({"type": "start", "time": mirror.synced_at})
        steps = itertools.count(1)
        stack.enter_context(repeated(lambda: _report(contexts, next(steps)), PACE_S))
        yield ports


def _report(contexts: dict[tuple[str, str], StageContext], step: int) -> None:
    """One step of every stage."""
    for (label, phase), context in contexts.items():
        if step % 10 == 0:
            context.resume.save(step, lambda folder: (folder / "state").touch())
        names = [metric.name.removeprefix(PREFIX) for metric in REPORTED_BY[label, phase]]
        context.progress(step, 1_000_000, phase, **dict.fromkeys(names, 0.05))
        if PERPLEXITY in REPORTED_BY[label, phase]:
            context.progress(step, 1_000_000, phase.replace("sft", "parent"), perplexity=1.0)


@contextlib.contextmanager
def operator_page(store: Store) -> Iterator[tuple[int, str]]:
    """The page of an operator, whose `Retraining` has succeeded once and runs again. Yields the port and the run.

    Args:
        store: takes its runs and its data set; an object store.
    """
    open_object_store(f"{store.uri}/corpora").put("a.jsonl", b'{"text": "one"}\n')
    with running_kfp() as kfp:
        world = World(kfp, store, now=datetime.now(UTC))
        dataset = {"prefix": f"{store.uri}/corpora", "quiet": "1s"}
        world.create(budget={"gpuHours": 1000, "wallHours": 1000}, trigger={"dataset": dataset})
        world.step(seconds=5)
        world.end()
        world.step()
        world.change_recipe(seed=2)
        run = world.step().run_id
        metrics, port = OperatorMetrics(), usable_port(None)

        def step() -> None:
            take_step(world.connections, metrics, NAMESPACE, NAME)
            metrics.measure_stores()

        with served_page(port, metrics, "the operator"), repeated(step, PACE_S):
            yield port, run


@contextlib.contextmanager
def declared_page(metrics: Sequence[Metric]) -> Iterator[int]:
    """A page with metrics as they are declared, whose counters and histograms grow. Yields the port."""
    registry = CollectorRegistry()
    made = [_Growing(metric, registry) for metric in metrics]

    def grow() -> None:
        for metric in made:
            metric.grow()

    class Page(BaseHTTPRequestHandler):
        """Answers in plain text, as vLLM does; the OpenMetrics text of its library has no colons in names."""

        def do_GET(self) -> None:
            text = generate_latest(registry)
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with repeated(grow, PACE_S):
                yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class _Growing:
    """A metric of a foreign program with a series for each value of its last label."""

    def __init__(self, metric: Metric, registry: CollectorRegistry) -> None:
        kind = {"gauge": Gauge, "counter": Counter, "histogram": Histogram}[metric.kind]
        made = kind(metric.name, metric.help, metric.labels, registry=registry)
        choices = {name: LABEL_VALUES.get(name, (name,)) for name in metric.labels}
        last = max(choices, key=lambda name: len(choices[name]))
        handler = {"handler": "/v1/chat/completions"} if "handler" in choices else {}
        first = {name: values[0] for name, values in choices.items()}
        self._series = [made.labels(**{**first, **handler, last: value}) for value in choices[last]]

    def grow(self) -> None:
        """Add one, or an observation."""
        for series in self._series:
            series.observe(1.0) if isinstance(series, Histogram) else series.inc()
