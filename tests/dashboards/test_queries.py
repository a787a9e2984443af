"""Every query of every panel is asked of a real Prometheus, which reads pages of stages, operator, vLLM and others."""

import contextlib
import time
from collections.abc import Iterator

import pytest

from components.core.base.metric_names import KUEUE, OPERATOR, REPORTED, ROLLOUTS, RUNTIME, VLLM, VLLM_HTTP
from components.core.store.store import open_store
from dashboards.alerts import ALERTS
from pipelines.run import submit
from tests.dashboards.pages import declared_page, operator_page, stage_pages
from tests.dashboards.prometheus import Prometheus, needs_prometheus, running_prometheus
from tests.dashboards.queries import DECLARED, METRICS, all_queries, metrics_of, with_values
from tests.pipelines.retraining.world import write_digest
from tests.s3_server import S3Server, fresh_prefix

ANSWER_S = 300.0
"""A query without data after this time has none."""


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Prometheus]:
    """It reads the pages of a stage of each kind, with two GPUs, of the operator, a server, Kueue and Rollouts."""
    folder = tmp_path_factory.mktemp("prometheus")
    (tool := folder / "nvidia-smi").write_text('#!/bin/sh\nprintf "0, 90, 1024\\n1, 70, 2048\\n"\n')
    tool.chmod(0o755)
    with contextlib.ExitStack() as stack:
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        patched.setenv("PATH", str(folder), prepend=":")
        patched.setenv("TESSERA_LOCAL", str(folder / "local"))
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        patched.setattr(submit, "compile_pipeline", write_digest)
        operator, run = stack.enter_context(operator_page(open_store(fresh_prefix(s3_server, patched))))
        stages = stack.enter_context(stage_pages(folder / "stages", run))
        foreign = (VLLM, KUEUE, ROLLOUTS)
        server, kueue, rollouts = (stack.enter_context(declared_page(metrics)) for metrics in foreign)
        targets = {port: {"namespace": "models", "pod": f"stage-{number}"} for number, port in enumerate(stages)}
        version = {"rollouts_pod_template_hash": "abc"}
        targets |= {server: {"namespace": "models", "pod": "server-0", **version}, kueue: {"namespace": "kueue-system"}}
        targets |= {rollouts: {"namespace": "argo-rollouts"}, operator: {"namespace": "models", "pod": "operator-0"}}
        yield stack.enter_context(running_prometheus(folder, targets))


def unanswered(prometheus: Prometheus, expressions: list[str], patience_s: float) -> list[str]:
    """Queries that have no data, asked again and again for a while."""
    ending, left = time.monotonic() + patience_s, expressions
    while left and time.monotonic() < ending:
        left = [expression for expression in left if not prometheus.ask(expression)]
        time.sleep(0.2)
    return left


@needs_prometheus
def test_every_query_of_every_panel_has_data(prometheus: Prometheus) -> None:
    expressions = sorted({with_values(query.expression) for query in all_queries()})
    assert len(expressions) > 50
    assert unanswered(prometheus, expressions, ANSWER_S) == []


@needs_prometheus
def test_a_metric_that_nobody_emits_has_none(prometheus: Prometheus) -> None:
    assert unanswered(prometheus, ["tessera_luck"], 1.0) == ["tessera_luck"]


@needs_prometheus
def test_every_metric_that_a_panel_or_an_alert_names_is_emitted(prometheus: Prometheus) -> None:
    """Also one whose absence a query would hide by `or vector(0)`."""
    series = [f"{metric}_count" if metric.kind == "histogram" else metric.name for metric in METRICS]
    assert unanswered(prometheus, series, ANSWER_S) == []


@needs_prometheus
def test_every_alert_is_a_query_and_none_is_on_while_all_is_well(prometheus: Prometheus) -> None:
    """But for the errors of the server, a third of whose requests fail here."""
    unanswered(prometheus, [f'{VLLM_HTTP}{{status="5xx"}}'], ANSWER_S)
    on = {alert.name for alert in ALERTS if prometheus.ask(alert.expression)}
    assert on <= {"ServingErrors"}


@needs_prometheus
def test_a_label_that_a_legend_names_is_one_that_the_result_has(prometheus: Prometheus) -> None:
    queries = [query for query in all_queries() if "{{" in query.legend]
    unanswered(prometheus, [with_values(query.expression) for query in queries], ANSWER_S)
    for query in queries:
        named = {part.partition("}}")[0] for part in query.legend.split("{{")[1:]} - {"phase"}  # many have none
        for series in prometheus.ask(with_values(query.expression)):
            assert named <= series["metric"].keys(), query


def test_queries_and_alerts_read_declared_metrics_and_every_declared_metric_is_read() -> None:
    shown = {name for query in all_queries() for name in metrics_of(query.expression)}
    watched = {name for alert in ALERTS for name in metrics_of(alert.expression)}
    assert shown | watched == DECLARED
    assert {metric.name for metric in (*REPORTED, *RUNTIME, *OPERATOR)} <= shown
