"""Fleet: who has the GPUs, who waits for them, what was taken away, and what retrainings do."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from components.core.base.metric_names import (
    CHECKPOINT_TIME,
    GPU_UTILIZATION,
    KUEUE_ADMITTED,
    KUEUE_EVICTED,
    KUEUE_PENDING,
    KUEUE_QUOTA,
    KUEUE_USAGE,
    KUEUE_WAIT,
    OPERATOR_ERRORS,
    PROGRESS_TIME,
    RETRAINING_DATASET_TIME,
    RETRAINING_PHASE,
    RETRAINING_STEP_TIME,
    RETRAINING_SUCCESS_TIME,
    RETRAINING_WANTED_TIME,
    START_TIME,
    STORE_BYTES,
    STORE_TIME,
    Metric,
)
from dashboards.budgets import spent_gpu_budget, spent_wall_budget
from dashboards.layout import Panel, dashboard

LEADER = 'replica_role!="follower"'
"""Each replica of Kueue exports the metrics; those of the leader, or of the only one, count."""
CHOSEN = 'namespace=~"$namespace"'
PHASE_WAITS = 'phase="WaitingForApproval"'


def build() -> Dashboard:
    """The dashboard."""
    first = [
        Panel(
            "Workloads that wait",
            "none",
            {"waiting": f"sum({kueue(KUEUE_PENDING)})"},
            "In all queues; the rows below say in which.",
            "number",
            (1, 50),
        ),
        Panel(
            "Wait for admission, p95",
            "s",
            {"p95": f"histogram_quantile(0.95, sum by (le) (rate({kueue(KUEUE_WAIT, '_bucket')}[1h])))"},
            "Of workloads admitted in the last hour; alert QueueWaitsTooLong.",
            "number",
            (600, 3600),
        ),
        Panel(
            "Stages without progress for 30 minutes",
            "none",
            {"stalled": f"count({here(PROGRESS_TIME)}) - (count(time() - {here(PROGRESS_TIME)} < 1800) or vector(0))"},
            "Not 0: alert RunStalled names them.",
            "number",
            (0.5, 1),
        ),
        Panel(
            "Idle GPUs",
            "none",
            {
                "idle": f"count({here(GPU_UTILIZATION)}) - "
                f"(count(avg_over_time({here(GPU_UTILIZATION)}[15m]) >= 0.05) or vector(0))"
            },
            "GPUs of a stage that were busy for less than 5 % of 15 minutes; alert GpuIdle names them.",
            "number",
            (0.5, 1),
        ),
    ]
    gpus = [
        Panel(
            "GPUs by run",
            "none",
            {"{{namespace}} {{run}}": f"count by (namespace, run) ({here(GPU_UTILIZATION)})"},
            "GPUs that stages have now, busy or not.",
        ),
        Panel(
            "GPU hours by run in this range",
            "h",
            {
                "{{namespace}} {{run}}": "sum_over_time((count by (namespace, run) "
                f"({here(GPU_UTILIZATION)}))[$__range:1m]) / 60"
            },
            "Hours in which a stage had a GPU.",
            "bars",
        ),
        Panel(
            "GPU use by namespace",
            "percentunit",
            {"{{namespace}}": f"avg by (namespace) ({here(GPU_UTILIZATION)})"},
            "Mean over the GPUs that stages have.",
        ),
        Panel(
            "Stages at work", "none", {"{{namespace}}": f"count by (namespace) ({here(START_TIME)})"}, "By namespace."
        ),
    ]
    queues = [
        Panel(
            "Workloads that wait, by queue",
            "none",
            {"{{cluster_queue}} {{status}}": f"sum by (cluster_queue, status) ({kueue(KUEUE_PENDING)})"},
            "`inadmissible` ones do not fit the quota at all: ask for less, or raise it.",
        ),
        Panel(
            "Wait for admission by queue, p95",
            "s",
            {
                "{{cluster_queue}}": "histogram_quantile(0.95, sum by (le, cluster_queue) "
                f"(rate({kueue(KUEUE_WAIT, '_bucket')}[1h])))"
            },
            "From creation to admission.",
        ),
        Panel(
            "Quota in use",
            "percentunit",
            {
                "{{cluster_queue}} {{resource}}": f"sum by (cluster_queue, resource) ({kueue(KUEUE_USAGE)}) / "
                f"sum by (cluster_queue, resource) ({kueue(KUEUE_QUOTA)})"
            },
            "Kueue exports it where its configuration sets metrics.enableClusterQueueResources.",
        ),
        Panel(
            "Admitted workloads",
            "none",
            {"{{cluster_queue}}": f"sum by (cluster_queue) ({kueue(KUEUE_ADMITTED)})"},
            "At work.",
        ),
        Panel(
            "Evictions in an hour",
            "none",
            {"{{cluster_queue}} {{reason}}": f"sum by (cluster_queue, reason) (increase({kueue(KUEUE_EVICTED)}[1h]))"},
            "`Preempted`: a workload of higher priority came.",
        ),
    ]
    retrainings = [
        Panel(
            "Waiting for approval",
            "none",
            {"waiting": f"sum({here(RETRAINING_PHASE, PHASE_WAITS)})"},
            "Their plans are above the budget, or have no price: `tessera retrain NAME` shows the numbers.",
            "number",
            (1, 5),
        ),
        Panel(
            "Longest wish without success",
            "s",
            {"longest": f"max(time() - {here(RETRAINING_WANTED_TIME)})"},
            "Since a run was wanted and none has succeeded; alert NoSuccessfulRetraining. No data: all is up to date.",
            "number",
            (86400, 7 * 86400),
        ),
        Panel(
            "Longest time without a step of the operator",
            "s",
            {"longest": f"max(time() - {here(RETRAINING_STEP_TIME)})"},
            "It takes a step of each Retraining every 30 s; alert OperatorStalled.",
            "number",
            (300, 1800),
        ),
        Panel(
            "Steps that failed in an hour",
            "none",
            {"failed": f"sum(increase({here(OPERATOR_ERRORS)}[1h]))"},
            "Steps of the operator that the API server did not let end. A few: somebody changed the object meanwhile.",
            "number",
            (10, 60),
        ),
        Panel(
            "Phases of Retrainings",
            "none",
            {"{{namespace}} {{phase}}": f"sum by (namespace, phase) ({here(RETRAINING_PHASE)})"},
            "`kubectl get retrainings` says which, and why.",
        ),
        Panel(
            "Time since the last success",
            "s",
            {"{{namespace}} {{retraining}}": f"time() - {here(RETRAINING_SUCCESS_TIME)}"},
            "Long is good where nothing has changed.",
            "bars",
        ),
        Panel(
            "Budget that is spent",
            "percentunit",
            {
                "{{namespace}} {{run}} GPU hours": spent_gpu_budget(CHOSEN),
                "{{namespace}} {{run}} duration": spent_wall_budget(CHOSEN),
            },
            "Of active runs whose Retraining has a budget; alert BudgetNearlySpent.",
        ),
    ]
    store = [
        Panel(
            "Size of stores",
            "bytes",
            {"{{store}}": f"max by (store) ({here(STORE_BYTES)})"},
            "Measured by the operator once an hour. `tessera store gc` removes what no run refers to.",
        ),
        Panel(
            "Age of data sets",
            "s",
            {"{{namespace}} {{retraining}}": f"time() - {here(RETRAINING_DATASET_TIME)}"},
            "Since the folder of `trigger.dataset` has changed. Longer than usual: its source may deliver no more.",
            "bars",
        ),
        Panel(
            "Events that are not in the store",
            "s",
            {"{{namespace}}": f"max by (namespace) (time() - {here(STORE_TIME)})"},
            "Of the stage that is furthest behind; climbs where the store does not answer: alert StoreUnreachable.",
        ),
        Panel(
            "Oldest checkpoint",
            "s",
            {"{{namespace}}": f"max by (namespace) (time() - {here(CHECKPOINT_TIME)})"},
            "Of stages that have saved one.",
        ),
    ]
    about = "Who has the GPUs, who waits for them, what was taken away, and what do retrainings do?"
    rows = {"GPUs": gpus, "Queues": queues, "Retrainings": retrainings, "Store": store}
    return dashboard("Fleet", about, ["namespace"], first, rows)


def here(metric: Metric, matchers: str = "") -> str:
    """The series of a metric of stages or the operator in the namespaces of the variable."""
    return f"{metric}{{{CHOSEN}{', ' * bool(matchers)}{matchers}}}"


def kueue(metric: Metric, suffix: str = "") -> str:
    """The series of a metric of Kueue."""
    return f"{metric}{suffix}{{{LEADER}}}"
