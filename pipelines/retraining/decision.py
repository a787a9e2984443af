"""Whether a planned run may start: its price against the budget, and the word of a person."""

from datetime import datetime

from pipelines.retraining.spec import APPROVED, PLURAL, Budget
from pipelines.retraining.status import RetrainingStatus


def judge_plan(status: RetrainingStatus, budget: Budget, approved_run: str, target: str, now: datetime) -> bool:
    """Write what stands in the way of the plan into the conditions; returns whether nothing does.

    A plan with stages on GPUs that no run has measured has no price. Where there is a budget, a person has to allow it.

    Args:
        status: has the plan, and takes the conditions.
        budget: the specification's.
        approved_run: name of the run that a person has approved.
        target: arguments of `kubectl annotate` that name the object.
        now: the present time.
    """
    plan = status.plan
    assert plan is not None
    reused = sum(stage.plan == "Reused" for stage in status.stages)
    price = f"{plan.gpu_hours:g} GPU hours"
    if plan.unmeasured:
        price += f", without {', '.join(plan.unmeasured)}, which no run has measured"
    message = f"{len(status.stages) - reused} stages run anew, {reused} are reused; {price}"
    status.judge("Planned", True, "Planned", message, now)

    limit, threshold = budget.gpu_hours, budget.approve_above_gpu_hours
    unknown = bool(plan.unmeasured) and (limit is not None or threshold is not None)
    is_above = limit is not None and plan.gpu_hours > limit
    if limit is None:
        status.judge("WithinBudget", True, "NoBudget", price, now)
    elif is_above:
        status.judge("WithinBudget", False, "OverBudget", f"{price}, of {limit:g} in budget.gpuHours", now)
    elif unknown:
        status.judge("WithinBudget", None, "NotMeasured", f"{price}, of {limit:g} in budget.gpuHours", now)
    else:
        status.judge("WithinBudget", True, "WithinBudget", f"{price}, of {limit:g} in budget.gpuHours", now)

    if not (is_above or unknown or (threshold is not None and plan.gpu_hours > threshold)):
        status.judge("Approved", True, "NotNeeded", "", now)
        return True
    if approved_run == plan.run:
        status.judge("Approved", True, "ByAnnotation", f"a person has approved {plan.run}: {price}", now)
        return True
    command = f"kubectl annotate --overwrite {PLURAL} {target} {APPROVED}={plan.run}"
    status.judge("Approved", False, "NeedsApproval", f"{price}; to run it: {command}", now)
    status.phase, status.reason = "WaitingForApproval", "OverBudget" if is_above else "NeedsApproval"
    return False
