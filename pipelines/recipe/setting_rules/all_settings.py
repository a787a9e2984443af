"""All settings of a recipe that `tessera init` writes, each with its reason. Light."""

import math
from collections.abc import Mapping

from pydantic import JsonValue

from components.data.data_facts import CorpusFacts, ProblemFacts
from pipelines.recipe.setting_rules.facts import MEMORY_SHARE, Facts, Setting, left_out, product_dtype
from pipelines.recipe.setting_rules.generation import deploy_settings, eval_settings, rl_settings, serving_settings
from pipelines.recipe.setting_rules.search import search_settings
from pipelines.recipe.setting_rules.training import corpus_training_settings, sft_settings, text_seq_len

EMPTY_SHARE = 0.95
"""Speed-up that is aimed at, as a share of what the limit promises: measured speeds differ by 9 % within one table."""
DEFAULT_LIMITS: Mapping[str, JsonValue] = {"latency_ms": "70%"}
TEXT_STAGES = ("search", "distill", "pretrain")
"""Stages that read the corpus."""


def all_settings(facts: Facts) -> list[Setting]:
    """The settings of every stage that the data is enough for; `null` leaves a stage out."""
    limits = facts.limits.model_dump(exclude_none=True) if facts.data.corpus else {}
    dtype = product_dtype(facts.computer, facts.stored)
    chats, corpus, problems = facts.data.chats, facts.data.corpus, facts.data.problems
    rl = left_out(("rl",), "no chats and problems")
    if chats and problems:
        rl = rl_settings(facts, chats, problems, dtype)
    if rl[0].key == "rl":  # problems are of a recipe's section `rl`, and go with it
        problems = None
    return [
        *placement(facts),
        *targets(limits, has_chats=chats is not None, has_problems=problems is not None),
        *serving_settings(facts),
        *(_text_settings(facts, corpus, dtype, problems) if corpus else left_out(TEXT_STAGES, "no corpus")),
        *(sft_settings(facts, chats, dtype) if chats else left_out(("sft",), "no chats")),
        *rl,
        *eval_settings(facts, chats, corpus, problems),
        *deploy_settings(facts, chats, problems),
    ]


def _text_settings(
    facts: Facts,
    corpus: CorpusFacts,
    dtype: Setting,
    problems: ProblemFacts | None,
) -> list[Setting]:
    """Search, distillation and continued pretraining."""
    seq_len, why = text_seq_len(corpus, facts.context, on_gpu=facts.gpus > 0)
    return [
        *search_settings(facts, seq_len, why, str(dtype.value), problems),
        *corpus_training_settings("distill", facts, corpus, (seq_len, why), dtype),
        *corpus_training_settings("pretrain", facts, corpus, (seq_len, why), dtype),
    ]


def placement(facts: Facts) -> list[Setting]:
    """Where stages run that are one process."""
    gib = max(1, int(MEMORY_SHARE * facts.memory_bytes / 2**30))
    found = [
        Setting("placement.threads", max(1, facts.cores), f"this machine has {facts.cores} cores"),
        Setting("placement.memory_gib", gib, f"{MEMORY_SHARE:.0%} of the {facts.memory_bytes / 2**30:.0f} GiB"),
    ]
    if facts.gpus:
        found.insert(0, Setting("placement.gpus", 1, f"one of the {facts.gpus}; trainings take all"))
    return found


def targets(limits: Mapping[str, JsonValue], *, has_chats: bool, has_problems: bool) -> list[Setting]:
    """What the report judges the run by."""
    found = []
    latency = limits.get("latency_ms")
    if isinstance(latency, str) and latency.endswith("%"):
        speed_up = math.floor(100 * EMPTY_SHARE * 100 / float(latency.removesuffix("%"))) / 100
        times = 100 / float(latency.removesuffix("%"))
        reason = f"a decode step of {latency} is {times:.2f}x the tokens a second; 5 % less, for noise"
        found.append(Setting("targets.speed_up", speed_up, reason))
    if limits and has_problems:
        reason = "the paper's child keeps 98 % (Puzzle, table 1), after far more tokens"
        found.append(Setting("targets.accuracy_retained", 0.97, reason))
    if has_chats:
        found.append(
            Setting("targets.format_after_sft", 0.95, "nineteen of twenty answers in the format of their mode")
        )
    if has_problems:
        found.append(Setting("targets.rl_gain", 0.03, "RL is worth its time from a few points on"))
    return found
