"""Serving: do users get answers, how fast, and how full are the servers."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from components.core.base.metric_names import (
    ROLLOUT_INFO,
    VLLM_ANSWER_TOKENS,
    VLLM_FIRST_TOKEN,
    VLLM_GENERATION_TOKENS,
    VLLM_HTTP,
    VLLM_INTER_TOKEN,
    VLLM_KV_CACHE,
    VLLM_LATENCY,
    VLLM_PREEMPTIONS,
    VLLM_PROMPT_TOKENS,
    VLLM_QUEUE_TIME,
    VLLM_REQUESTS,
    VLLM_RUNNING,
    VLLM_WAITING,
    Metric,
)
from dashboards.layout import Panel, dashboard

VERSION = "rollouts_pod_template_hash"
"""Label of the version of a server, by which a canary stands beside the stable version; empty without Rollouts."""
CHOSEN = 'namespace=~"$namespace", model_name=~"$model"'
HTTP = f'{VLLM_HTTP}{{namespace=~"$namespace", handler=~"/v1/.*"'
ERRORS = f'(sum(rate({HTTP}, status="5xx"}}[$__rate_interval])) or vector(0)) / sum(rate({HTTP}}}[$__rate_interval]))'
"""A server without errors has no series of status 5xx."""


def build() -> Dashboard:
    """The dashboard."""
    first = [
        Panel(
            "Failed requests",
            "percentunit",
            {"failed": ERRORS},
            "Answers with status 5xx; alert ServingErrors.",
            "number",
            (0.001, 0.01),
        ),
        Panel(
            "Time to the first token, p95",
            "s",
            {"p95": quantile(0.95, VLLM_FIRST_TOKEN)},
            "Over 2.5 s users wait; alert ServingSlow.",
            "number",
            (1, 2.5),
        ),
        Panel(
            "Requests that wait",
            "none",
            {"waiting": f"sum({chosen(VLLM_WAITING)})"},
            "In the queues.",
            "number",
            (1, 20),
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            {"fullest": f"max({chosen(VLLM_KV_CACHE)})"},
            "Of the fullest server; above 90 % requests are preempted.",
            "number",
            (0.8, 0.95),
        ),
    ]
    latency = [
        Panel("Time to the first token", "s", _quantiles(VLLM_FIRST_TOKEN), "Queue and prefill."),
        Panel("Time between two tokens", "s", _quantiles(VLLM_INTER_TOKEN), "The pace of an answer."),
        Panel("Time of a request", "s", _quantiles(VLLM_LATENCY), "From arrival to the last token."),
        Panel(
            "Time in the queue", "s", _quantiles(VLLM_QUEUE_TIME), "Before prefill; climbs where servers are too few."
        ),
    ]
    load = [
        Panel(
            "Tokens a second",
            "none",
            {
                "{{pod}} generated": f"sum by (pod) ({rate(VLLM_GENERATION_TOKENS)})",
                "{{pod}} of prompts": f"sum by (pod) ({rate(VLLM_PROMPT_TOKENS)})",
            },
            "By server, so that a new version stands beside the old one.",
        ),
        Panel(
            "Requests",
            "none",
            {
                "{{pod}} computed": f"sum by (pod) ({chosen(VLLM_RUNNING)})",
                "{{pod}} waiting": f"sum by (pod) ({chosen(VLLM_WAITING)})",
            },
            "By server.",
        ),
        Panel("KV cache in use", "percentunit", {"{{pod}}": f"max by (pod) ({chosen(VLLM_KV_CACHE)})"}, "By server."),
        Panel(
            "Preemptions a second",
            "none",
            {"{{pod}}": f"sum by (pod) ({rate(VLLM_PREEMPTIONS)})"},
            "KV cache is short.",
        ),
    ]
    answers = [
        Panel(
            "Why answers end",
            "none",
            {"{{finished_reason}}": f"sum by (finished_reason) ({rate(VLLM_REQUESTS)})"},
            "A second. `length`: cut off at the limit; `abort`: the client has left; `error`: the server failed.",
        ),
        Panel("Length of an answer", "none", _quantiles(VLLM_ANSWER_TOKENS), "Tokens, thinking included."),
        Panel(
            "Requests by status",
            "none",
            {"{{status}}": f"sum by (status) (rate({HTTP}}}[$__rate_interval]))"},
            "A second, by the web server: 4xx is the client's fault, 5xx ours.",
        ),
    ]
    rows = {"Latency": latency, "Canary": _canary(), "Load": load, "Answers": answers}
    return dashboard("Serving", "Do users get answers, and how fast?", ["namespace", "model"], first, rows)


def chosen(metric: Metric) -> str:
    """The series of a metric that the variables choose."""
    return f"{metric}{{{CHOSEN}}}"


def rate(metric: Metric) -> str:
    """How fast a counter grows, a second."""
    return f"rate({chosen(metric)}[$__rate_interval])"


def quantile(fraction: float, metric: Metric, by: str = "") -> str:
    """A quantile of a histogram, over all servers or by a label."""
    labels = f"le, {by}" if by else "le"
    buckets = f"rate({metric}_bucket{{{CHOSEN}}}[$__rate_interval])"
    return f"histogram_quantile({fraction}, sum by ({labels}) ({buckets}))"


def _quantiles(metric: Metric) -> dict[str, str]:
    """Median and tail, by model."""
    return {
        f"{{{{model_name}}}} p{fraction * 100:g}": quantile(fraction, metric, "model_name")
        for fraction in (0.5, 0.95, 0.99)
    }


def _canary() -> list[Panel]:
    """A canary beside the stable version."""
    failed = f'sum by ({VERSION}) (rate({HTTP}, status="5xx"}}[$__rate_interval]))'
    served = f"sum by ({VERSION}) (rate({HTTP}}}[$__rate_interval]))"
    legend = f"{{{{{VERSION}}}}}"
    return [
        Panel(
            "Failed requests by version", "percentunit", {legend: f"{failed} / {served}"}, "A canary beside the others."
        ),
        Panel("Requests by version", "none", {legend: served}, "A second; a canary gets 20, 40, 60 % of them."),
        Panel(
            "Time to the first token by version",
            "s",
            {f"{legend} p95": quantile(0.95, VLLM_FIRST_TOKEN, VERSION)},
            "At 1.5 times that of the stable version, in the mean, a canary ends.",
        ),
        Panel(
            "Time between two tokens by version",
            "s",
            {f"{legend} p95": quantile(0.95, VLLM_INTER_TOKEN, VERSION)},
            "At 1.5 times that of the stable version, in the mean, a canary ends.",
        ),
        Panel(
            "Phase of rollouts",
            "none",
            {"{{name}} {{phase}}": f'sum by (name, phase) ({ROLLOUT_INFO}{{name=~"tessera-serving-.*"}})'},
            "Abort: a canary was refused, all users are with the version before; alert CanaryFailed.",
        ),
    ]
