"""Which metrics each stage reports, by its label and phase: what pages for Prometheus are made of in tests.

`tests/components/test_reported_metrics.py` holds that the stages report just these.
"""

from components.core.base.metric_names import (
    ACCURACY,
    ANSWER_TOKENS,
    CLIPPED,
    COSINE,
    DATA_STALL,
    ENTROPY,
    ERROR,
    FORMAT,
    GRAD_NORM,
    GROUPS_SAMPLED,
    GROUPS_WITH_SPREAD,
    KL,
    LEARNING_RATE,
    LOG_RATIO,
    LOSS,
    MAX_LOG_RATIO,
    MFU,
    PERPLEXITY,
    PREFIX,
    REWARD,
    TOKENS_PER_S,
    TRUNCATED,
    Metric,
)

TRAINING = {LOSS, GRAD_NORM, LEARNING_RATE, TOKENS_PER_S, DATA_STALL, MFU}
"""MFU where the peak of the GPU is known."""
REPORTED_BY: dict[tuple[str, str], set[Metric]] = {
    ("pretrain", ""): TRAINING,
    ("distill", ""): TRAINING | {KL, COSINE},
    ("rl", ""): {
        *(REWARD, ACCURACY, FORMAT, ANSWER_TOKENS, TRUNCATED, GROUPS_WITH_SPREAD, GROUPS_SAMPLED, ENTROPY),
        *(CLIPPED, KL, GRAD_NORM, LOG_RATIO, MAX_LOG_RATIO),
    },
    ("search/library-0", "block library"): {ERROR},
    ("search/search", "candidates distilled"): {KL},
    ("eval", "held-out text of sft"): {PERPLEXITY},
}


def reported(label: str, phase: str = "") -> set[str]:
    """Names as a stage reports them."""
    return {metric.name.removeprefix(PREFIX) for metric in REPORTED_BY[label, phase]}
