"""The page with the metrics of a stage, as Prometheus reads it."""

import math
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from components.core.base.metric_names import (
    CHECKPOINT_TIME,
    LOSS,
    PERPLEXITY,
    PROGRESS_TIME,
    REPORTED,
    RUNTIME,
    START_TIME,
    STEPS_DONE,
    STEPS_PLANNED,
    STORE_TIME,
    Metric,
)
from components.core.base.ports import is_free, usable_port
from components.core.runtime.context import StageContext, quiet_context
from components.core.runtime.event_mirror import mirrored_events
from components.core.runtime.events import Events
from components.core.runtime.monitoring.exposition import served_metrics
from components.core.runtime.runner import events_path
from components.core.runtime.stage_command import METRICS_PORT, command_line, main
from components.core.store.store import open_store
from tests.components.core import fake_stage
from tests.components.core.fake_stage import numbers_folder
from tests.waiting import PATIENCE_S, wait_until

Samples = Mapping[str, Mapping[tuple[str, ...], float]]
"""By the name of a metric, and the values of its labels."""
LABELS = {metric.name: metric.labels for metric in (*REPORTED, *RUNTIME)}


@pytest.fixture
def port() -> int:
    return usable_port(None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sft.jsonl"


@pytest.fixture
def context(tmp_path: Path, path: Path) -> StageContext:
    """A context that reports to the file of events."""
    made = quiet_context(tmp_path)
    made.reporter = Events(path)
    return made


def read(port: int) -> Samples:
    """The page; every metric on it is declared, with its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sorted(sample.labels) == sorted(LABELS[sample.name])
            values = tuple(sample.labels[name] for name in LABELS[sample.name])
            found.setdefault(sample.name, {})[values] = sample.value
    return found


def only(samples: Samples, metric: Metric) -> float:
    """The value of a metric that has one series."""
    (value,) = samples[metric.name].values()
    return value


@pytest.mark.parametrize(("in_pod", "address"), [(False, "127.0.0.1"), (True, "0.0.0.0")])
def test_other_machines_read_the_page_of_a_pod_alone(
    port: int, path: Path, monkeypatch: pytest.MonkeyPatch, *, in_pod: bool, address: str
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if in_pod:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    with served_metrics(port, path, "nano", "sft", None):
        own = psutil.Process().net_connections()
        assert [each.laddr.ip for each in own if each.status == "LISTEN" and each.laddr.port == port] == [address]


def test_the_page_has_the_last_value_of_each_metric_by_run_stage_and_phase(
    port: int, path: Path, context: StageContext
) -> None:
    with served_metrics(port, path, "nano", "search/library-0", None):
        assert read(port) == {}
        began = time.time()
        context.reporter.emit({"type": "start", "time": began})
        context.progress(1, 4, "", loss=2.0)
        context.progress(2, 4, "", loss=math.nan, not_declared=1.0)
        context.progress(3, 3, "held-out text of sft", perplexity=7.5)
        context.progress(32, 0, "starting a server")  # seconds, and no steps
        context.note("a note has no metrics")
        samples = read(port)
    place = ("nano", "search/library-0")
    assert math.isnan(samples[LOSS.name][(*place, "")])
    assert samples[PERPLEXITY.name] == {(*place, "held-out text of sft"): 7.5}
    assert samples[STEPS_DONE.name] == {(*place, ""): 2, (*place, "held-out text of sft"): 3}
    assert samples[STEPS_PLANNED.name] == {(*place, ""): 4, (*place, "held-out text of sft"): 3}
    assert samples[START_TIME.name] == {place: pytest.approx(began)}
    assert began <= only(samples, PROGRESS_TIME) <= time.time()
    assert CHECKPOINT_TIME.name not in samples


def test_the_time_of_the_last_checkpoint_comes_with_the_progress_after_it(
    port: int, path: Path, context: StageContext
) -> None:
    with served_metrics(port, path, "nano", "sft", None):
        before = time.time()
        context.resume.save(1, lambda folder: (folder / "state").touch())
        saved = time.time()
        context.progress(2, 4)
        assert before <= only(read(port), CHECKPOINT_TIME) <= saved


def test_values_of_an_earlier_attempt_are_not_on_the_page(port: int, path: Path, context: StageContext) -> None:
    context.progress(3, 4, "", loss=1.0)
    with served_metrics(port, path, "nano", "sft", None):
        context.progress(1, 4)
        samples = read(port)
    assert only(samples, STEPS_DONE) == 1
    assert LOSS.name not in samples


def test_the_page_says_when_the_store_had_all_events(port: int, s3_uri: str, tmp_path: Path) -> None:
    store = open_store(s3_uri, local=tmp_path)
    with mirrored_events(store, "nano", "sft") as mirror:
        assert mirror is not None
        with served_metrics(port, events_path(store, "nano", "sft"), "nano", "sft", mirror):
            before = mirror.synced_at
            assert before <= only(read(port), STORE_TIME) <= mirror.synced_at


def test_a_stage_whose_port_is_taken_works_without_a_page(
    port: int, path: Path, context: StageContext, capsys: pytest.CaptureFixture[str]
) -> None:
    with served_metrics(port, path, "nano", "first", None):
        with served_metrics(port, path, "nano", "second", None):
            context.progress(1, 4)
        assert list(read(port)[STEPS_DONE.name]) == [("nano", "first", "")]
    assert f"Prometheus cannot read the metrics of second at port {port}" in capsys.readouterr().err
    assert is_free(port)


def test_a_stage_that_is_started_by_its_command_serves_its_metrics_until_it_ends(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(METRICS_PORT, str(port))
    monkeypatch.setenv(fake_stage.HOLD, str(tmp_path / "hold"))
    is_held = fake_stage.hold_at(tmp_path / "hold", 3)  # the time of the second checkpoint came with the third step
    store = open_store(tmp_path / "store")
    numbers = store.put_folder(numbers_folder(tmp_path / "numbers", *range(5)), "data").digest
    places = {"store": store.uri, "run": "nano", "label": "fakes"}
    arguments = command_line("tests.components.core.fake_stage:STAGE", places, {"numbers": numbers}, {})[2:]
    codes: list[int] = []
    stage = threading.Thread(target=lambda: codes.append(main(arguments)))
    stage.start()
    wait_until("three steps", lambda: is_held() or not stage.is_alive())
    samples = read(port)
    (tmp_path / "hold").unlink()
    stage.join()
    assert codes == [0]
    assert samples[STEPS_PLANNED.name] == {("nano", "fakes", ""): 5}
    assert only(samples, START_TIME) <= only(samples, CHECKPOINT_TIME) <= time.time()
    assert is_free(port)
