"""The metrics that Prometheus has of stages and the operator, and those of others that dashboards and alerts read.

Each is declared once, here. Stages report the metrics of `REPORTED` with their progress, under the name without
`PREFIX`; MLflow has them under that name too. Names end with the unit.
"""

from dataclasses import dataclass
from typing import Literal

PREFIX = "tessera_"
STAGE, PHASE, GPU = ("run", "stage"), ("run", "stage", "phase"), ("run", "stage", "gpu")
"""Labels: `stage` is the role of the stage in the run, `phase` what it does now; Prometheus adds the namespace."""
RETRAINING = ("retraining",)
RETRAINING_RUN = (*RETRAINING, "run")
MODEL, QUEUE = ("model_name", "engine"), ("cluster_queue", "replica_role")


@dataclass(frozen=True)
class Metric:
    """A metric of Prometheus; in a text it stands for its name.

    Attributes:
        name: as in a query.
        help: what it measures, with the unit.
        labels: which it has where it is exported.
        kind: of the metric; a query of a histogram adds `_bucket`, `_sum` or `_count` to the name.
    """

    name: str
    help: str
    labels: tuple[str, ...]
    kind: Literal["gauge", "counter", "histogram"] = "gauge"

    def __str__(self) -> str:
        """The name."""
        return self.name


LOSS = Metric("tessera_loss", "Training loss of the step, nats a counted token", PHASE)
KL = Metric(
    "tessera_kl", "KL divergence: of the student from the teacher, in RL of the policy from its start; nats", PHASE
)
COSINE = Metric("tessera_cosine", "Cosine distance of the hidden states of student and teacher", PHASE)
GRAD_NORM = Metric("tessera_grad_norm", "Norm of the gradient before clipping", PHASE)
LEARNING_RATE = Metric("tessera_learning_rate", "Learning rate of the step", PHASE)
TOKENS_PER_S = Metric("tessera_tokens_per_s", "Tokens trained on a second, mean since the start of this attempt", PHASE)
MFU = Metric(
    "tessera_mfu", "Model FLOPs utilization of the step: those that the model needs, of the peak of its GPUs", PHASE
)
DATA_STALL = Metric("tessera_data_stall", "Fraction of the step's time in which it waited for its rows", PHASE)
ERROR = Metric("tessera_error", "Blockwise local distillation: mean normalised error of the blocks", PHASE)
PERPLEXITY = Metric("tessera_perplexity", "Perplexity on held-out text of the model that the phase names", PHASE)
REWARD = Metric("tessera_reward", "Mean reward of the answers of a step", PHASE)
ACCURACY = Metric("tessera_accuracy", "Fraction of answers that are right", PHASE)
FORMAT = Metric("tessera_format", "Fraction of answers in the format of their mode", PHASE)
ANSWER_TOKENS = Metric("tessera_answer_tokens", "Mean length of an answer, tokens", PHASE)
TRUNCATED = Metric("tessera_truncated", "Fraction of answers cut off at the token limit", PHASE)
GROUPS_WITH_SPREAD = Metric(
    "tessera_groups_with_spread", "Fraction of groups whose rewards differ, so that one learns", PHASE
)
GROUPS_SAMPLED = Metric("tessera_groups_sampled", "Groups of answers that a step sampled", PHASE)
ENTROPY = Metric("tessera_entropy", "Entropy of the policy, nats a token, estimated from the sampled tokens", PHASE)
CLIPPED = Metric("tessera_clipped", "Fraction of tokens at which the policy ratio is clipped", PHASE)
LOG_RATIO = Metric("tessera_log_ratio", "Mean over tokens of the absolute log ratio of learner and engine, nats", PHASE)
MAX_LOG_RATIO = Metric(
    "tessera_max_log_ratio", "Largest absolute log ratio of learner and engine of a step, nats", PHASE
)

REPORTED = (
    *(LOSS, KL, COSINE, GRAD_NORM, LEARNING_RATE, TOKENS_PER_S, MFU, DATA_STALL, ERROR, PERPLEXITY),
    *(REWARD, ACCURACY, FORMAT, ANSWER_TOKENS, TRUNCATED, GROUPS_WITH_SPREAD, GROUPS_SAMPLED, ENTROPY),
    *(CLIPPED, LOG_RATIO, MAX_LOG_RATIO),
)
"""What stages report with their progress."""

STEPS_DONE = Metric("tessera_steps_done", "Steps of the phase that are done", PHASE)
STEPS_PLANNED = Metric("tessera_steps_planned", "Steps of the phase", PHASE)
START_TIME = Metric("tessera_stage_start_time_seconds", "When this attempt at the stage began, Unix time", STAGE)
PROGRESS_TIME = Metric("tessera_progress_time_seconds", "When the stage last reported progress, Unix time", STAGE)
CHECKPOINT_TIME = Metric("tessera_checkpoint_time_seconds", "When the last checkpoint was complete, Unix time", STAGE)
STORE_TIME = Metric("tessera_store_time_seconds", "When the store last had every event of the stage, Unix time", STAGE)
GPU_UTILIZATION = Metric("tessera_gpu_utilization_ratio", "Fraction of the last second in which the GPU was busy", GPU)
GPU_MEMORY = Metric("tessera_gpu_memory_used_bytes", "Memory in use on the GPU", GPU)

RUNTIME = (
    *(STEPS_DONE, STEPS_PLANNED, START_TIME, PROGRESS_TIME, CHECKPOINT_TIME),
    *(STORE_TIME, GPU_UTILIZATION, GPU_MEMORY),
)
"""What the runtime adds."""

RETRAINING_PHASE = Metric(
    "tessera_retraining_phase", "1 for the `phase` of a Retraining, 0 for others", (*RETRAINING, "phase")
)
RETRAINING_STEP_TIME = Metric(
    "tessera_retraining_step_time_seconds", "When the operator last took a step of a Retraining, Unix time", RETRAINING
)
RETRAINING_SUCCESS_TIME = Metric(
    "tessera_retraining_success_time_seconds", "When a run of a Retraining last succeeded, Unix time", RETRAINING
)
RETRAINING_WANTED_TIME = Metric(
    "tessera_retraining_wanted_time_seconds",
    "Since when a Retraining has wanted a run and none has succeeded, Unix time",
    RETRAINING,
)
RETRAINING_DATASET_TIME = Metric(
    "tessera_retraining_dataset_time_seconds", "Since when the data set's folder is as it is, Unix time", RETRAINING
)
RETRAINING_RUN_TIME = Metric(
    "tessera_retraining_run_time_seconds",
    "When the run of a Retraining that is active began, Unix time",
    RETRAINING_RUN,
)
RETRAINING_WALL_BUDGET = Metric(
    "tessera_retraining_wall_budget_seconds", "Duration after which that run is ended", RETRAINING_RUN
)
RETRAINING_GPU_BUDGET = Metric(
    "tessera_retraining_gpu_budget_hours", "GPU hours of the budget of that run", RETRAINING_RUN
)
OPERATOR_ERRORS = Metric(
    "tessera_operator_errors_total", "Steps of the operator that ended with an error of the cluster", (), "counter"
)
STORE_BYTES = Metric("tessera_store_bytes", "Size of all objects of a store, measured once an hour", ("store",))

OPERATOR = (
    *(RETRAINING_PHASE, RETRAINING_STEP_TIME, RETRAINING_SUCCESS_TIME, RETRAINING_WANTED_TIME, RETRAINING_DATASET_TIME),
    *(RETRAINING_RUN_TIME, RETRAINING_WALL_BUDGET, RETRAINING_GPU_BUDGET, OPERATOR_ERRORS, STORE_BYTES),
)
"""What the operator of retrainings exports."""

VLLM_RUNNING = Metric("vllm:num_requests_running", "Requests that are computed", MODEL)
VLLM_WAITING = Metric("vllm:num_requests_waiting", "Requests that wait", MODEL)
VLLM_KV_CACHE = Metric("vllm:kv_cache_usage_perc", "Fraction of the KV cache in use", MODEL)
VLLM_PREEMPTIONS = Metric("vllm:num_preemptions_total", "Requests whose KV cache was taken away", MODEL, "counter")
VLLM_PROMPT_TOKENS = Metric("vllm:prompt_tokens_total", "Tokens of prompts", MODEL, "counter")
VLLM_GENERATION_TOKENS = Metric("vllm:generation_tokens_total", "Generated tokens", MODEL, "counter")
VLLM_REQUESTS = Metric(
    "vllm:request_success_total", "Finished requests, by `finished_reason`", (*MODEL, "finished_reason"), "counter"
)
VLLM_ANSWER_TOKENS = Metric("vllm:request_generation_tokens", "The length of an answer, tokens", MODEL, "histogram")
VLLM_FIRST_TOKEN = Metric("vllm:time_to_first_token_seconds", "The time to the first token", MODEL, "histogram")
VLLM_INTER_TOKEN = Metric("vllm:inter_token_latency_seconds", "The time between two tokens", MODEL, "histogram")
VLLM_LATENCY = Metric("vllm:e2e_request_latency_seconds", "The time of a whole request", MODEL, "histogram")
VLLM_QUEUE_TIME = Metric("vllm:request_queue_time_seconds", "The time that a request waits", MODEL, "histogram")
VLLM_HTTP = Metric(
    "http_requests_total",
    "HTTP requests, by `handler`, `method`, `status` (2xx, 4xx, 5xx)",
    ("handler", "method", "status"),
    "counter",
)

VLLM = (
    *(VLLM_RUNNING, VLLM_WAITING, VLLM_KV_CACHE, VLLM_PREEMPTIONS, VLLM_PROMPT_TOKENS, VLLM_GENERATION_TOKENS),
    *(VLLM_REQUESTS, VLLM_ANSWER_TOKENS, VLLM_FIRST_TOKEN, VLLM_INTER_TOKEN, VLLM_LATENCY, VLLM_QUEUE_TIME, VLLM_HTTP),
)
"""Of vLLM 0.32, `vllm/v1/metrics/loggers.py`; the last is of its web server, `prometheus_fastapi_instrumentator`."""

KUEUE_PENDING = Metric(
    "kueue_pending_workloads", "Workloads that wait, by `status`: active or inadmissible", (*QUEUE, "status")
)
KUEUE_ADMITTED = Metric("kueue_admitted_active_workloads", "Admitted workloads that have not ended", QUEUE)
KUEUE_WAIT = Metric(
    "kueue_admission_wait_time_seconds", "The time from creation to admission", (*QUEUE, "priority_class"), "histogram"
)
KUEUE_EVICTED = Metric(
    "kueue_evicted_workloads_total",
    "Evictions, by `reason`",
    (*QUEUE, "reason", "underlying_cause", "priority_class"),
    "counter",
)
KUEUE_USAGE = Metric(
    "kueue_cluster_queue_resource_usage",
    "Quota in use, by `flavor` and `resource`",
    (*QUEUE, "cohort", "flavor", "resource"),
)
KUEUE_QUOTA = Metric(
    "kueue_cluster_queue_nominal_quota", "Quota, by `flavor` and `resource`", (*QUEUE, "cohort", "flavor", "resource")
)

KUEUE = (KUEUE_PENDING, KUEUE_ADMITTED, KUEUE_WAIT, KUEUE_EVICTED, KUEUE_USAGE, KUEUE_QUOTA)
"""Of Kueue 0.19, `pkg/metrics/metrics.go`. It exports the last two where its configuration sets
`metrics.enableClusterQueueResources`."""

ROLLOUT_INFO = Metric(
    "rollout_info",
    "1 for the `phase` of a Rollout: Progressing, Paused, Completed, or Abort, Timeout, Error, InvalidSpec",
    ("namespace", "name", "strategy", "traffic_router", "phase"),
)

ROLLOUTS = (ROLLOUT_INFO,)
"""Of Argo Rollouts 1.10, `controller/metrics/prommetrics.go`. A monitor of its controller may rename `namespace`."""
