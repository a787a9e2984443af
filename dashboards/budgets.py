"""What a run has used of the budget of its `Retraining`: queries that a panel and an alert share."""

from components.core.base.metric_names import (
    GPU_UTILIZATION,
    RETRAINING_GPU_BUDGET,
    RETRAINING_RUN_TIME,
    RETRAINING_WALL_BUDGET,
)

SINCE, STEP, STEPS_AN_HOUR = "7d", "5m", 12
"""GPU hours are counted over a week at most, by the number of GPUs that stages of the run have every five minutes."""


def spent_gpu_budget(matchers: str = "") -> str:
    """GPU hours of an active run, of those of its budget.

    Args:
        matchers: of the series that count.
    """
    spent = f"sum_over_time((count by (namespace, run) ({GPU_UTILIZATION}{{{matchers}}}))[{SINCE}:{STEP}])"
    return f"{spent} / {STEPS_AN_HOUR} / on (namespace, run) group_right {RETRAINING_GPU_BUDGET}{{{matchers}}}"


def spent_wall_budget(matchers: str = "") -> str:
    """Time since an active run began, of the time that its budget gives it."""
    return f"(time() - {RETRAINING_RUN_TIME}{{{matchers}}}) / {RETRAINING_WALL_BUDGET}{{{matchers}}}"
