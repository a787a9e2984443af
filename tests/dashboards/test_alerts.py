"""Alerts as `promtool` evaluates them: which series set each of them off, which do not, and what it then says."""

import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dashboards.alerts import ALERTS
from infra.chart import CHART
from tests.dashboards.prometheus import PROMTOOL, needs_promtool

RULES = CHART / "rules" / "alerts.yaml"
STAGE = {"namespace": "models", "run": "nano", "stage": "sft"}
RL = {**STAGE, "stage": "rl"}
PLACE = "stage sft of run nano in models"
HTTP = {"namespace": "models", "handler": "/v1/chat/completions", "method": "POST"}
SERVED = {"namespace": "models", "model_name": "nano"}
ROLLOUT = {"namespace": "models", "name": "tessera-serving-nano"}
QUEUE = {"cluster_queue": "gpu", "replica_role": "leader"}
RETRAINED = {"namespace": "models", "retraining": "nano"}
RETRAINED_RUN = {**RETRAINED, "run": "nano-1"}


class Series(NamedTuple):
    """A series: a value a minute from time 0 on; `2+1x3` is 2, 3, 4, 5."""

    name: str
    labels: dict[str, str]
    values: str

    def text(self) -> str:
        """Name and labels as in a query."""
        labels = ", ".join(f'{name}="{value}"' for name, value in self.labels.items())
        return f"{self.name}{{{labels}}}"


class Case(NamedTuple):
    """What an alert says at a minute, None where it is not on; and the labels of its result."""

    alert: str
    series: list[Series]
    minute: int
    summary: str | None = None
    labels: dict[str, str] | None = None


def stage(metric: str, values: str, **labels: str) -> list[Series]:
    return [Series(f"tessera_{metric}", {**STAGE, **labels}, values)]


def requests(good: str, failed: str) -> list[Series]:
    name = "http_requests_total"
    return [Series(name, {**HTTP, "status": "2xx"}, good), Series(name, {**HTTP, "status": "5xx"}, failed)]


def first_tokens(all_: str, fast: str) -> list[Series]:
    name = "vllm:time_to_first_token_seconds"
    return [Series(f"{name}_count", SERVED, all_), Series(f"{name}_bucket", {**SERVED, "le": "2.5"}, fast)]


def waits(under_an_hour: str, all_: str) -> list[Series]:
    name = "kueue_admission_wait_time_seconds_bucket"
    buckets = {"3600": under_an_hour, "7200": all_, "+Inf": all_}
    return [Series(name, {**QUEUE, "le": limit}, values) for limit, values in buckets.items()]


def queue(pending: str, admitted: str) -> list[Series]:
    waiting = Series("kueue_pending_workloads", {**QUEUE, "status": "active"}, pending)
    return [waiting, Series("kueue_admitted_active_workloads", QUEUE, admitted)]


def perplexities(**values: str) -> list[Series]:
    return [
        series
        for role, value in values.items()
        for series in stage("perplexity", f"{value}+0x5", stage="eval", phase=f"held-out text of {role}")
    ]


def gpus(number: int) -> list[Series]:
    """So many GPUs of a run, which is active for ten hours."""
    used = {**STAGE, "run": "nano-1"}
    return [Series("tessera_gpu_utilization_ratio", {**used, "gpu": str(gpu)}, "0.9+0x600") for gpu in range(number)]


def wall_budget(seconds: str) -> list[Series]:
    began = Series("tessera_retraining_run_time_seconds", RETRAINED_RUN, "0+0x600")
    return [began, Series("tessera_retraining_wall_budget_seconds", RETRAINED_RUN, seconds)]


CASES = [
    Case("RunStalled", stage("progress_time_seconds", "60+0x60"), 40, f"No progress for 39m 0s: {PLACE}", STAGE),
    Case("RunStalled", stage("stage_start_time_seconds", "0+0x60"), 40, f"No progress for 40m 0s: {PLACE}", STAGE),
    Case("RunStalled", stage("progress_time_seconds", "60+0x60"), 33),
    Case("RunStalled", [*stage("progress_time_seconds", "0+60x60"), *stage("stage_start_time_seconds", "0+0x60")], 40),
    Case("LossNotFinite", stage("loss", "2 2 NaN"), 2, f"The loss is not finite: {PLACE}", STAGE),
    Case("LossNotFinite", stage("loss", "2 2 Inf"), 2, f"The loss is not finite: {PLACE}", STAGE),
    Case("LossNotFinite", stage("loss", "2 2 1e9"), 2),
    Case(
        "LossJumped",
        stage("loss", "2+0x60 4+0x10"),
        70,
        f"The loss is 4, half more than in the last hour: {PLACE}",
        STAGE,
    ),
    Case("LossJumped", stage("loss", "2+0x60 4+0x2 2+0x10"), 70),
    Case("LossJumped", stage("loss", "9-0.1x70"), 70),
    Case(
        "HeldOutPerplexityRises",
        perplexities(parent="10", random_child="100", distilled="14", sft="16"),
        1,
        "Perplexity 16, half more than of the parent: held-out text of sft, nano",
        {**STAGE, "stage": "eval", "phase": "held-out text of sft"},
    ),
    Case("HeldOutPerplexityRises", perplexities(parent="10", random_child="100", sft="14"), 1),
    Case(
        "RlRewardFalls",
        stage("reward", "1+0x120 0.5+0x60", **RL),
        180,
        "The reward has fallen to 0.5: stage rl of run nano in models",
        RL,
    ),
    Case("RlRewardFalls", stage("reward", "1+0x120 0.9+0x60", **RL), 180),
    Case("RlRewardFalls", stage("reward", "0.2+0.005x180", **RL), 180),
    Case(
        "RlFormatCollapses",
        stage("format", "1+0x60 0.2+0x40", **RL),
        95,
        "Only 20% of answers are in format: stage rl of run nano in models",
        RL,
    ),
    Case("RlFormatCollapses", stage("format", "0.2+0x100", **RL), 95),
    Case(
        "EngineLearnerDrift",
        stage("log_ratio", "0.2+0x40", **RL),
        30,
        "Engine and learner differ by 0.2 nats a token: stage rl of run nano in models",
        RL,
    ),
    Case("EngineLearnerDrift", stage("log_ratio", "0.05+0x40", **RL), 30),
    Case(
        "GpuIdle",
        stage("gpu_utilization_ratio", "0+0x60", gpu="3"),
        45,
        f"GPU 3 was busy 0% of 15 minutes: {PLACE}",
        {**STAGE, "gpu": "3"},
    ),
    Case("GpuIdle", stage("gpu_utilization_ratio", "0+0x60", gpu="3"), 20),
    Case("GpuIdle", stage("gpu_utilization_ratio", "0.6+0x60", gpu="3"), 45),
    Case(
        "CheckpointTooOld",
        stage("checkpoint_time_seconds", "0+0x90"),
        70,
        f"The last checkpoint is 1h 10m 0s old: {PLACE}",
        STAGE,
    ),
    Case("CheckpointTooOld", stage("checkpoint_time_seconds", "0+60x90"), 70),
    Case(
        "StoreUnreachable",
        stage("store_time_seconds", "0+0x20"),
        10,
        f"Nothing reached the store for 10m 0s: {PLACE}",
        STAGE,
    ),
    Case("StoreUnreachable", stage("store_time_seconds", "0+60x20"), 10),
    Case(
        "QueueWaitsTooLong",
        waits("0+0x90", "0+1x90"),
        90,
        "Workloads of queue gpu wait too long",
        {"cluster_queue": "gpu"},
    ),
    Case("QueueWaitsTooLong", waits("0+1x90", "0+1x90"), 90),
    Case(
        "QueueWaitsTooLong",
        queue("2+0x120", "0+0x120"),
        100,
        "Workloads of queue gpu wait too long",
        {"cluster_queue": "gpu"},
    ),
    Case("QueueWaitsTooLong", queue("2+0x120", "0+0x120"), 40),
    Case("QueueWaitsTooLong", queue("2+0x120", "3+0x120"), 100),
    Case("QueueWaitsTooLong", queue("2 0 2+0x50 0 2+0x60", "0+0x120"), 100),
    Case("ServingErrors", requests("0+98x90", "0+2x90"), 70, "2% of requests in models fail", {"namespace": "models"}),
    Case("ServingErrors", requests("0+9999x90", "0+1x90"), 70),
    Case("ServingErrors", requests("0+90x90", "0+10x50 500+0x40"), 80),
    Case(
        "ServingErrors",
        requests("0+992x600", "0+8x600"),
        500,
        "0.8% of requests in models fail",
        {"namespace": "models"},
    ),
    Case("ServingSlow", first_tokens("0+100x90", "0+50x90"), 70, "50% of requests to nano wait over 2.5 s", SERVED),
    Case("ServingSlow", first_tokens("0+1000x90", "0+995x90"), 70),
    Case(
        "CanaryFailed",
        [Series("rollout_info", {**ROLLOUT, "phase": "Abort"}, "1+0x9")],
        5,
        "The new version of tessera-serving-nano was refused (Abort)",
        {**ROLLOUT, "phase": "Abort"},
    ),
    Case("CanaryFailed", [Series("rollout_info", {**ROLLOUT, "phase": "Progressing"}, "1+0x9")], 5),
    Case("CanaryFailed", [Series("rollout_info", {"name": "other", "phase": "Abort"}, "1+0x9")], 5),
    Case(
        "BudgetNearlySpent",
        [*gpus(2), Series("tessera_retraining_gpu_budget_hours", RETRAINED_RUN, "20+0x600")],
        540,
        "Run nano-1 of nano has used 90.83% of its budget",
        RETRAINED_RUN,
    ),
    Case(
        "BudgetNearlySpent", [*gpus(2), Series("tessera_retraining_gpu_budget_hours", RETRAINED_RUN, "20+0x600")], 450
    ),
    Case("BudgetNearlySpent", gpus(2), 540),
    Case(
        "BudgetNearlySpent",
        wall_budget("36000+0x600"),
        500,
        "Run nano-1 of nano has used 83.33% of its budget",
        RETRAINED_RUN,
    ),
    Case("BudgetNearlySpent", wall_budget("36000+0x600"), 450),
    Case(
        "NoSuccessfulRetraining",
        [Series("tessera_retraining_wanted_time_seconds", RETRAINED, "60+0x10200")],
        10_140,
        "nano has wanted a run for 7d 0h 59m 0s, and none has succeeded",
        RETRAINED,
    ),
    Case("NoSuccessfulRetraining", [Series("tessera_retraining_wanted_time_seconds", RETRAINED, "60+0x10200")], 10_080),
    Case(
        "OperatorStalled",
        [Series("tessera_retraining_step_time_seconds", RETRAINED, "60+0x60")],
        40,
        "The operator has taken no step of nano for 39m 0s",
        RETRAINED,
    ),
    Case("OperatorStalled", [Series("tessera_retraining_step_time_seconds", RETRAINED, "0+60x60")], 40),
]


@needs_promtool
@pytest.mark.parametrize("alert", [alert.name for alert in ALERTS])
def test_each_alert_is_on_where_it_should_be_and_says_what_is_wrong(alert: str, tmp_path: Path) -> None:
    found = run_promtool([case for case in CASES if case.alert == alert], tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr


@needs_promtool
def test_promtool_reads_the_file_of_all_alerts() -> None:
    assert PROMTOOL is not None
    subprocess.run([PROMTOOL, "check", "rules", str(RULES)], capture_output=True, check=True)


@needs_promtool
def test_promtool_would_find_a_fault(tmp_path: Path) -> None:
    assert run_promtool([CASES[0]._replace(summary="another")], tmp_path).returncode == 1


@pytest.mark.parametrize("alert", ALERTS, ids=[alert.name for alert in ALERTS])
def test_each_alert_has_cases_of_both_kinds_and_a_section_of_the_page(alert: Any) -> None:
    assert {case.summary is None for case in CASES if case.alert == alert.name} == {True, False}
    page = (CHART.parents[1] / "dashboards" / "alerts.md").read_text()
    (section,) = (part for part in page.split("\n## ") if part.startswith(f"{alert.name}\n"))
    assert all(text in section for text in (alert.meaning, alert.look, alert.remedy, alert.expression))


def rule_of(alert: str) -> dict[str, Any]:
    """The rule of an alert, as the chart has it."""
    (rule,) = (rule for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"] if rule["alert"] == alert)
    found: dict[str, Any] = rule
    return found


def run_promtool(cases: list[Case], folder: Path) -> "subprocess.CompletedProcess[str]":
    """What promtool says of cases of one alert. It computes every rule of its file for each minute: it gets one."""
    group = {"name": "tessera", "rules": [rule_of(cases[0].alert)]}
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [group]}))
    tests = {"rule_files": [str(folder / "rules.yaml")], "tests": [promtool_test(case) for case in cases]}
    (folder / "tests.yaml").write_text(yaml.safe_dump(tests))
    assert PROMTOOL is not None
    command = [PROMTOOL, "test", "rules", str(folder / "tests.yaml")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def promtool_test(case: Case) -> dict[str, Any]:
    """A case as promtool reads it."""
    rule = rule_of(case.alert)
    expected = {
        "exp_labels": {**rule["labels"], **(case.labels or {})},
        "exp_annotations": {**rule["annotations"], "summary": case.summary},
    }
    check = {"eval_time": f"{case.minute}m", "alertname": case.alert, "exp_alerts": [expected] if case.summary else []}
    series = [{"series": one.text(), "values": one.values} for one in case.series]
    return {"interval": "1m", "input_series": series, "alert_rule_test": [check]}
