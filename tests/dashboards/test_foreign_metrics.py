"""The metrics of vLLM, Kueue and Argo Rollouts that are declared are those of their sources."""

import ast
import importlib.util
import os
import re
from pathlib import Path

import pytest

from components.core.base.metric_names import KUEUE, ROLLOUT_INFO, VLLM, VLLM_HTTP

KINDS = {"_gauge_cls": "gauge", "_counter_cls": "counter", "_histogram_cls": "histogram"}
GO_MODULES = Path(os.environ.get("GOMODCACHE", Path.home() / "go" / "pkg" / "mod"))
ROLLOUTS_SOURCE = GO_MODULES / "github.com/argoproj/argo-rollouts@v1.10.1/controller/metrics"
KUEUE_SOURCE = GO_MODULES / "sigs.k8s.io/kueue@v0.19.2/pkg/metrics/metrics.go"


def source_of(package: str, file: str) -> str:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return (Path(spec.origin).parent / file).read_text(encoding="utf-8")


def test_vllm_exports_each_under_this_name_with_this_kind_and_these_labels() -> None:
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse(source_of("vllm", "v1/metrics/loggers.py"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KINDS:
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if isinstance(named := keywords["name"], ast.Constant):
                kind = KINDS[node.func.attr]
                name = str(named.value)
                found[f"{name}_total" if kind == "counter" else name] = kind, ast.unparse(keywords["labelnames"])
    common = ("model_name", "engine")
    for metric in VLLM:
        if metric is not VLLM_HTTP:
            more = list(metric.labels[len(common) :])
            assert metric.labels[: len(common)] == common
            assert found[metric.name] == (metric.kind, f"labelnames + {more}" if more else "labelnames"), metric
    assert 'labelnames = ["model_name", "engine"]' in source_of("vllm", "v1/metrics/loggers.py")


def test_the_web_server_of_vllm_counts_requests_by_handler_method_and_status() -> None:
    assert "prometheus_fastapi_instrumentator" in source_of("vllm", "entrypoints/serve/instrumentator/metrics.py")
    text = source_of("prometheus_fastapi_instrumentator", "metrics.py")
    assert f'metric_name: str = "{VLLM_HTTP}"' in text
    assert re.findall(r'label_names\.append\("(\w+)"\)', text) == list(VLLM_HTTP.labels)


@pytest.mark.skipif(
    not KUEUE_SOURCE.exists(), reason="needs the sources of Kueue, which the test cluster is built from"
)
def test_kueue_exports_each_under_this_name_with_this_kind_and_these_labels() -> None:
    found: dict[str, tuple[str, set[str]]] = {}
    for text in KUEUE_SOURCE.read_text().split("= prometheus.New")[1:]:
        name, labels = re.search(r'Name:\s*"(\w+)"', text), re.search(r"\[\]string\{([^}]*)\}", text)
        if name and labels:
            found[f"kueue_{name[1]}"] = text.partition("Vec")[0].lower(), set(re.findall(r'"(\w+)"', labels[1]))
    for metric in KUEUE:
        assert found[metric.name] == (metric.kind, set(metric.labels))


@pytest.mark.skipif(
    not ROLLOUTS_SOURCE.exists(), reason="needs the sources of Argo Rollouts, which the test cluster is built from"
)
def test_rollouts_exports_its_phase_under_these_labels_and_names() -> None:
    text = (ROLLOUTS_SOURCE / "prommetrics.go").read_text()
    declared = re.search(r'MetricRolloutInfo = prometheus\.NewDesc\(\s*"(\w+)",[^)]*append\((\w+), ([^)]*)\)', text)
    assert declared is not None
    common = re.search(rf"{declared[2]}\s*=\s*\[\]string\{{([^}}]*)\}}", text)
    assert common is not None
    labels = re.findall(r'"(\w+)"', common[1] + declared[3])
    assert (declared[1], tuple(labels)) == (ROLLOUT_INFO.name, ROLLOUT_INFO.labels)
    phases = set(re.findall(r'RolloutPhase = "(\w+)"', (ROLLOUTS_SOURCE / "rollouts.go").read_text()))
    assert {"Abort", "Timeout", "Error", "InvalidSpec", "Progressing", "Paused", "Completed"} == phases
