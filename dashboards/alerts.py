"""Alerts of Prometheus, each with what it means, where to look first, and what helps."""

from dataclasses import dataclass
from typing import Any, Literal

from components.core.base.metric_names import (
    CHECKPOINT_TIME,
    FORMAT,
    GPU_UTILIZATION,
    KUEUE_ADMITTED,
    KUEUE_PENDING,
    KUEUE_WAIT,
    LOG_RATIO,
    LOSS,
    PERPLEXITY,
    PROGRESS_TIME,
    RETRAINING_STEP_TIME,
    RETRAINING_WANTED_TIME,
    REWARD,
    ROLLOUT_INFO,
    START_TIME,
    STORE_TIME,
    VLLM_FIRST_TOKEN,
    VLLM_HTTP,
)
from dashboards.budgets import spent_gpu_budget, spent_wall_budget

STAGE = "stage {{ $labels.stage }} of run {{ $labels.run }} in {{ $labels.namespace }}"
HTTP = f'{VLLM_HTTP}{{handler=~"/v1/.*"'
WAITING = f'{KUEUE_PENDING}{{status="active"}}'
PARENT, TRAINED = 'phase="held-out text of parent"', 'phase=~"held-out text of (distilled|pretrained|sft|rl)"'
"""The perplexity of the parent, and of models after the search; baselines of the search may be bad."""
ERROR_BUDGET, SLOW_BUDGET, SLOW_S = 0.001, 0.01, "2.5"
"""Fraction of requests that may fail; that may wait longer than `SLOW_S`, a bucket of vLLM, for the first token."""
NEARLY, STALE_DAYS = 0.8, 7
"""Fraction of a budget that is used, and days without a success, from which an alert is on."""


@dataclass(frozen=True)
class Alert:
    """An alert.

    Attributes:
        name: of the alert.
        expression: in the language of Prometheus; the alert is on while it has a result.
        wait: how long it must have one.
        severity: `page`: someone must look now; `ticket`: today.
        summary: one line; `{{ $labels.… }}` stands for a label of the result.
        meaning: what is wrong.
        look: where to look first.
        remedy: what helps.
    """

    name: str
    expression: str
    wait: str
    severity: Literal["page", "ticket"]
    summary: str
    meaning: str
    look: str
    remedy: str


def rules() -> dict[str, Any]:
    """The alerts as a file of rules of Prometheus."""
    return {"groups": [{"name": "tessera", "rules": [_rule(alert) for alert in ALERTS]}]}


def page() -> str:
    """The page of the alerts, Markdown."""
    parts = [
        "# Alerts\n\nMade by `python -m dashboards` from `dashboards/alerts.py`; the alerts carry the same sentences.\n"
    ]
    for alert in ALERTS:
        parts.append(
            f"## {alert.name}\n\n{alert.severity}, after {alert.wait} of\n\n```\n{alert.expression}\n```\n\n"
            f"- **Meaning:** {alert.meaning}\n- **First look:** {alert.look}\n- **Remedy:** {alert.remedy}\n"
        )
    return "\n".join(parts)


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expression,
        "for": alert.wait,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.meaning,
            "first_look": alert.look,
            "remedy": alert.remedy,
        },
    }


def _failed(window: str) -> str:
    """Fraction of requests that failed."""
    failed, all_ = (f"sum by (namespace) (rate({HTTP}{more}}}[{window}]))" for more in (', status="5xx"', ""))
    return f"{failed} / {all_}"


def _slow(window: str) -> str:
    """Fraction of requests whose first token came late."""
    fast = f'sum by (namespace, model_name) (rate({VLLM_FIRST_TOKEN}_bucket{{le="{SLOW_S}"}}[{window}]))'
    return f"1 - {fast} / sum by (namespace, model_name) (rate({VLLM_FIRST_TOKEN}_count[{window}]))"


def _burns(fraction: Any, budget: float) -> str:
    """Whether a month's budget is used up in two days, or in five; the short windows end the alert soon after."""
    fast = f"({fraction('1h')} > {14.4 * budget:g} and {fraction('5m')} > {14.4 * budget:g})"
    slow = f"({fraction('6h')} > {6 * budget:g} and {fraction('30m')} > {6 * budget:g})"
    return f"{fast} or {slow}"


ALERTS = (
    Alert(
        "RunStalled",
        f"time() - ({PROGRESS_TIME} or {START_TIME}) > 1800",
        "5m",
        "page",
        f"No progress for {{{{ $value | humanizeDuration }}}}: {STAGE}",
        "The stage is at work, and has reported no step for half an hour.",
        "The log of its pod, then the dashboard Run: is its GPU busy, does the store answer? A stage that compiles or "
        "loads a large model is silent for minutes, not for half an hour.",
        "Delete the pod: the stage goes on from its last checkpoint. If it stalls at the same step again, the data of "
        "that step or a lost rank is the cause.",
    ),
    Alert(
        "LossNotFinite",
        f"{LOSS} != {LOSS} or abs({LOSS}) == Inf",
        "0m",
        "page",
        f"The loss is not finite: {STAGE}",
        "The loss is NaN or infinite, and with it the weights: every further step is wasted.",
        "Dashboard Training: did the gradient norm grow before, at which learning rate?",
        "Stop the run. Lower the learning rate or lengthen the warm-up of the stage, or set its dtype to float32; then "
        "submit the recipe again.",
    ),
    Alert(
        "LossJumped",
        f"{LOSS} > 1.5 * quantile_over_time(0.5, {LOSS}[1h])",
        "5m",
        "ticket",
        f'The loss is {{{{ $value | printf "%.3g" }}}}, half more than in the last hour: {STAGE}',
        "The loss is 50 % over the median of its last hour, and has not come back within five minutes.",
        "Dashboard Training: gradient norm and learning rate; the log, for a restart from a checkpoint.",
        "A spike that falls again needs nothing. Else look at the rows of those steps, and lower the learning rate.",
    ),
    Alert(
        "HeldOutPerplexityRises",
        f"{PERPLEXITY}{{{TRAINED}}} > on (namespace, run) group_left "
        f"1.5 * max by (namespace, run) ({PERPLEXITY}{{{PARENT}}})",
        "0m",
        "ticket",
        'Perplexity {{ $value | printf "%.3g" }}, half more than of the parent: {{ $labels.phase }}, {{ $labels.run }}',
        "A model of the run predicts text that it was not trained on much worse than the parent does.",
        "Report of the run: after which stage did the perplexity rise?",
        "After the search: a larger budget or more distillation. After fine-tuning or RL: fewer steps, a lower "
        "learning rate. `deploy.gate.max_perplexity_ratio` keeps such a model from promotion.",
    ),
    Alert(
        "RlRewardFalls",
        f"avg_over_time({REWARD}[30m]) < 0.8 * max_over_time(avg_over_time({REWARD}[30m])[6h:5m])",
        "15m",
        "ticket",
        f'The reward has fallen to {{{{ $value | printf "%.3g" }}}}: {STAGE}',
        "The mean reward of half an hour is a fifth below the best of six hours: the policy gets worse.",
        "Dashboard RL: format, answers cut off, KL and clipped tokens.",
        "Stop the run and go on from an earlier model with a lower learning rate, or set rl.kl_coef. Where answers are "
        "cut off, raise rl.max_tokens.",
    ),
    Alert(
        "RlFormatCollapses",
        f"avg_over_time({FORMAT}[15m]) < 0.5 and max_over_time({FORMAT}[6h]) > 0.8",
        "10m",
        "page",
        f"Only {{{{ $value | humanizePercentage }}}} of answers are in format: {STAGE}",
        "Most answers had the format of their mode, and now fewer than half have: nothing can be graded any more.",
        "Dashboard RL: length and answers cut off. Answers that grow over the limit lose their end.",
        "Stop the run: it learns nothing. Raise rl.max_tokens, or lower the learning rate; then start from the "
        "fine-tuned model.",
    ),
    Alert(
        "EngineLearnerDrift",
        f"avg_over_time({LOG_RATIO}[15m]) > 0.1",
        "10m",
        "page",
        f'Engine and learner differ by {{{{ $value | printf "%.3g" }}}} nats a token: {STAGE}',
        "vLLM and the learner give the same tokens different probabilities: the gradient is of another model than the "
        "one that answered.",
        "Dashboard RL: did it come at once, or grow? The log: versions of the weights, dtype of engine and learner.",
        "At once: the weights did not arrive; delete the pod, so that it goes on from its checkpoint. It grows: set "
        "rl.dtype to float32, or take fewer updates a step.",
    ),
    Alert(
        "GpuIdle",
        f"avg_over_time({GPU_UTILIZATION}[15m]) < 0.05 and {GPU_UTILIZATION} offset 15m >= 0",
        "15m",
        "ticket",
        f"GPU {{{{ $labels.gpu }}}} was busy {{{{ $value | humanizePercentage }}}} of 15 minutes: {STAGE}",
        "A stage has a GPU and does not use it.",
        "Dashboard Run: does the stage progress? Does it transfer inputs, or wait for a lock of another run?",
        "Stalled: see RunStalled. Else give the stage less: `placement.gpus` of the recipe.",
    ),
    Alert(
        "CheckpointTooOld",
        f"time() - {CHECKPOINT_TIME} > 3600",
        "5m",
        "page",
        f"The last checkpoint is {{{{ $value | humanizeDuration }}}} old: {STAGE}",
        "A crash now costs more than an hour of work. Stages that never saved one do not count.",
        "The log of the pod: does saving or copying fail? Dashboard Run: events that are not in the store.",
        "Store full: `tessera store gc`, or more space. No answer: see StoreUnreachable. Else set "
        "resume_interval_s of the stage: without it checkpoints are rare where each costs much.",
    ),
    Alert(
        "StoreUnreachable",
        f"time() - {STORE_TIME} > 300",
        "2m",
        "page",
        f"Nothing reached the store for {{{{ $value | humanizeDuration }}}}: {STAGE}",
        "The stage works on, but its events do not arrive in the store; neither will checkpoints and results.",
        "Can another pod of the namespace reach the endpoint? Keys expired, quota of the bucket, network policies?",
        "Restore the store. The stage repeats by itself; it fails only where a result cannot be stored in the end.",
    ),
    Alert(
        "QueueWaitsTooLong",
        f"histogram_quantile(0.95, sum by (cluster_queue, le) (rate({KUEUE_WAIT}_bucket[1h]))) > 3600 or "
        f"(min by (cluster_queue) (min_over_time({WAITING}[1h]) > 0 and {WAITING} offset 1h > 0) "
        f"unless max by (cluster_queue) (max_over_time({KUEUE_ADMITTED}[1h])) > 0)",
        "15m",
        "ticket",
        "Workloads of queue {{ $labels.cluster_queue }} wait too long",
        "One in twenty waited for more than an hour, or some wait and none has been at work for an hour.",
        "Dashboard Fleet: who has the quota, what is inadmissible? `kubectl get workloads` says why one waits.",
        "Raise the quota of the pool in the chart's values, give urgent runs a priority, or end runs that idle.",
    ),
    Alert(
        "ServingErrors",
        _burns(_failed, ERROR_BUDGET),
        "2m",
        "page",
        "{{ $value | humanizePercentage }} of requests in {{ $labels.namespace }} fail",
        f"Of 1000 requests {ERROR_BUDGET * 1000:g} may fail; at this rate a month's errors are used up in days.",
        "Dashboard Serving: by which status, since when; logs of the servers; was a model changed?",
        "A new model: go back to the one before. Out of memory: fewer parallel requests. Overload: more servers.",
    ),
    Alert(
        "ServingSlow",
        _burns(_slow, SLOW_BUDGET),
        "2m",
        "page",
        f"{{{{ $value | humanizePercentage }}}} of requests to {{{{ $labels.model_name }}}} wait over {SLOW_S} s",
        f"Of 100 requests {SLOW_BUDGET * 100:g} may wait longer than {SLOW_S} s for the first token; at this rate a "
        "month's share is used up in days.",
        "Dashboard Serving: time in the queue, KV cache, preemptions, length of the prompts.",
        "A long queue: more servers. A full KV cache: shorter limits, or more memory. A new model: go back.",
    ),
    Alert(
        "CanaryFailed",
        f'{ROLLOUT_INFO}{{name=~"tessera-serving-.*", phase=~"Abort|Timeout|Error|InvalidSpec"}} == 1',
        "1m",
        "ticket",
        "The new version of {{ $labels.name }} was refused ({{ $labels.phase }})",
        "A new version of a served model did not pass its canary, or did not start. All requests go to the version "
        "before; Git still names the new one.",
        "`kubectl describe rollout NAME` says which check; the log of its Job has the table of the questions. What the "
        "users saw: dashboard Serving, row Canary.",
        "Revert the commit that changed the digest; then Git and cluster agree again. A chance result: the same digest "
        "again, by `kubectl argo rollouts retry rollout NAME`.",
    ),
    Alert(
        "BudgetNearlySpent",
        f"{spent_gpu_budget()} > {NEARLY} or {spent_wall_budget()} > {NEARLY}",
        "0m",
        "ticket",
        "Run {{ $labels.run }} of {{ $labels.retraining }} has used {{ $value | humanizePercentage }} of its budget",
        f"Of the GPU hours or the duration in the budget of a Retraining, {NEARLY:.0%} are used, and its run is still "
        "active. At the end of `wallHours` the operator ends the run; at the end of `gpuHours` nobody does.",
        "Dashboard Run: how much is left of the stage, and does it progress? `tessera retrain NAME` has the stages.",
        "Worth more: raise `budget` in Git; it counts for the active run. Not worth it: end the run in Kubeflow "
        "Pipelines; its stages save checkpoints, and the next run of the recipe resumes there.",
    ),
    Alert(
        "NoSuccessfulRetraining",
        f"time() - {RETRAINING_WANTED_TIME} > {STALE_DAYS} * 86400",
        "15m",
        "ticket",
        "{{ $labels.retraining }} has wanted a run for {{ $value | humanizeDuration }}, and none has succeeded",
        f"Something asked for a run {STALE_DAYS} days ago or more, and none has succeeded since: the model gets old.",
        "`kubectl describe retraining NAME`: does it wait for approval or data, is its recipe wrong, or do its runs "
        "fail?",
        "Approve the plan, correct the recipe, or mend what the condition `Succeeded` says. Not wanted any more: "
        "`suspend: true`.",
    ),
    Alert(
        "OperatorStalled",
        f"time() - {RETRAINING_STEP_TIME} > 1800",
        "5m",
        "ticket",
        "The operator has taken no step of {{ $labels.retraining }} for {{ $value | humanizeDuration }}",
        "The operator runs, and has not come to the end of a step of this Retraining for half an hour; it should every "
        "30 s. Its trigger, its run and its promotion wait.",
        "Log of the pod `tessera-operator`: does the API server refuse its writes, or does a server not answer?",
        "A large data set may take that long to be copied: wait. Else delete the pod: it goes on where it was.",
    ),
)
