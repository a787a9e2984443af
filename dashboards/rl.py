"""RL: does the reward rise for the right reason, and do engine and learner agree."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from components.core.base.metric_names import (
    ACCURACY,
    ANSWER_TOKENS,
    CLIPPED,
    ENTROPY,
    FORMAT,
    GRAD_NORM,
    GROUPS_SAMPLED,
    GROUPS_WITH_SPREAD,
    KL,
    LOG_RATIO,
    MAX_LOG_RATIO,
    REWARD,
    STEPS_DONE,
    TRUNCATED,
)
from dashboards.layout import Panel, dashboard, of_stage

RL = 'stage=~"rl.*"'


def build() -> Dashboard:
    """The dashboard."""
    run = "{{run}} {{stage}}"
    first = [
        Panel("Reward", "none", {run: of_stage(REWARD)}, "Mean of the last step.", "number"),
        Panel("Right answers", "percentunit", {run: of_stage(ACCURACY)}, "Pass rate of the last step.", "number"),
        Panel(
            "Answers in format",
            "percentunit",
            {run: of_stage(FORMAT)},
            "Below one half: the format collapses; alert RlFormatCollapses.",
            "number",
            (0.8, 0.5),
        ),
        Panel(
            "Engine against learner",
            "none",
            {run: of_stage(LOG_RATIO)},
            "Mean absolute log ratio, nats. Over 0.1 they compute different models; alert EngineLearnerDrift.",
            "number",
            (0.05, 0.1),
        ),
    ]
    answers = [
        Panel("Reward", "none", {run: of_stage(REWARD)}, "Accuracy and format together."),
        Panel("Right answers", "percentunit", {run: of_stage(ACCURACY)}, "Fraction of the answers of a step."),
        Panel("Answers in format", "percentunit", {run: of_stage(FORMAT)}, "Format of the mode, thinking on or off."),
        Panel("Length of an answer", "none", {run: of_stage(ANSWER_TOKENS)}, "Tokens, mean."),
        Panel("Answers cut off", "percentunit", {run: of_stage(TRUNCATED)}, "At rl.max_tokens; high: raise it."),
        Panel(
            "Groups that teach",
            "percentunit",
            {run: of_stage(GROUPS_WITH_SPREAD)},
            "Groups whose rewards differ. None: problems are too easy or too hard, and nothing is learned.",
        ),
        Panel(
            "Groups sampled", "none", {run: of_stage(GROUPS_SAMPLED)}, "More than a step learns from: some replaced."
        ),
    ]
    learner = [
        Panel("Entropy", "none", {run: of_stage(ENTROPY)}, "Nats a token. Near 0 all answers of a group are alike."),
        Panel("KL from the start", "none", {run: of_stage(KL, RL)}, "Nats; 0 where rl.kl_coef is 0."),
        Panel("Clipped tokens", "percentunit", {run: of_stage(CLIPPED)}, "High: steps are too large."),
        Panel(
            "Log ratio of engine and learner",
            "none",
            {f"{run} mean": of_stage(LOG_RATIO), f"{run} max": of_stage(MAX_LOG_RATIO)},
            "Nats, over the tokens of a step.",
        ),
        Panel("Gradient norm", "none", {run: of_stage(GRAD_NORM, RL)}, "Before clipping."),
        Panel("Steps a minute", "none", {run: f"deriv({of_stage(STEPS_DONE, RL)}[10m]) * 60"}, "Rollout and update."),
    ]
    about = "Does the reward rise, for the right reason, and do engine and learner agree?"
    return dashboard("RL", about, ["namespace", "run"], first, {"Answers": answers, "Learner": learner})
