"""The rules of the search: space, budget, calibration, and how much is trained and scored. Light.

Paper: Puzzle is arXiv 2411.19146.
"""

from pydantic import JsonValue

from components.core.model.architecture import Architecture
from components.data.data_facts import ProblemFacts
from components.search.config import SearchConfig, Space
from components.search.costs.work_time import TRAINED, scoring_flops
from components.search.space.layer_space import layer_spaces, shape_of
from pipelines.recipe.setting_rules.facts import Facts, Setting
from pipelines.recipe.setting_rules.generation import served_dtype, workload
from pipelines.recipe.setting_rules.training import MAX_EPOCHS

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 32_768
"""Tokens of a batch of the search."""
FFN_FRACTIONS = (1.0, 0.5, 0.25)
BLD_FLOPS = 14
"""Operations for a weight of the parent and a token in the block library: 2 for the parent, and 6 for variants that
have twice its weights together."""
MIN_BLD_STEPS, MAX_BLD_STEPS = 10, 2000
MAX_SCORING_BATCHES = 4
"""Text that every alternative is scored on, at most. More hardly changes the choice: by the scores of 511 tokens it
was 3.5 % worse on other text than the best one there, by those of 2,044 it was 2.4 % (`tests/bench/scoring.md`)."""


def search_settings(
    facts: Facts,
    seq_len: int,
    why: str,
    dtype: str,
    problems: ProblemFacts | None,
) -> list[Setting]:
    """The search: space, budget, calibration, and how much the block library is trained."""
    rows = calibration_rows(seq_len, on_gpu=facts.gpus > 0)
    tokens = rows * seq_len
    fractions, (load, load_reason) = ffn_fractions(facts.parent), workload(facts, problems)
    space = SearchConfig.parse({"ffn_fractions": fractions.value}, where="search")
    if served_dtype(facts) != facts.stored:
        load["dtype"] = "float32"
        load_reason += "; as precise as it is served"
    return [
        Setting(
            "search.limits",
            facts.limits.model_dump(exclude_none=True),
            "the budget of the child, shares of the parent's own cost",
        ),
        fractions,
        Setting("search.shards", max(1, facts.gpus), "one for each device that can build a part of the library"),
        Setting("search.dtype", dtype, "the faster one, as in training"),
        Setting("search.seq_len", seq_len, why),
        Setting("search.batch_size", rows, f"{tokens:,} tokens a batch"),
        library_steps(facts, tokens, dtype),
        scoring_batches(facts, space, rows, seq_len, dtype),
        Setting("search.measurement", load, load_reason),
    ]


def ffn_fractions(parent: Architecture) -> Setting:
    """Widths of FFNs that the search offers."""
    widths = {block.intermediate_size for block in parent.blocks if isinstance(block.intermediate_size, int)}
    fractions: list[JsonValue] = [f for f in FFN_FRACTIONS if all((f * width).is_integer() for width in widths)]
    reason = "widths that the parent divides into; the paper has 9 (Puzzle, section 2)"
    return Setting("search.ffn_fractions", fractions, reason)


def calibration_rows(seq_len: int, *, on_gpu: bool) -> int:
    """Rows of a batch of the search."""
    return max(1, (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS) // seq_len)


def library_steps(facts: Facts, tokens: int, dtype: str) -> Setting:
    """Steps of the block library, of batches of so many tokens."""
    step_flops = BLD_FLOPS * facts.parent.parameters * tokens
    steps = int(facts.stage_s * TRAINED * facts.computer.flops(dtype) / max(1, facts.gpus) / step_flops)
    have = facts.data.corpus.tokens if facts.data.corpus else 0
    steps = max(MIN_BLD_STEPS, min(MAX_BLD_STEPS, steps, MAX_EPOCHS * have // tokens))
    return Setting(
        "search.distillation.num_steps",
        steps,
        f"{steps * tokens:,} tokens: {facts.time_in_words(1)} at most, and {MAX_EPOCHS} times your text; the paper's "
        "quality saturates after 0.5 B (arXiv 2411.19146, table 10)",
    )


def scoring_batches(facts: Facts, space: Space, rows: int, seq_len: int, dtype: str) -> Setting:
    """Batches of text that every alternative is scored on: as many as there is time for.

    Args:
        facts: of parent and device.
        space: what the search offers.
        rows: of a batch.
        seq_len: tokens of a row.
        dtype: of products of matrices.
    """
    spaces = layer_spaces(space, shape_of(facts.parent))
    batch_s = facts.computer.computing_s(scoring_flops(facts.parent, spaces, rows * seq_len, seq_len), dtype)
    batches = max(1, min(MAX_SCORING_BATCHES, int(facts.stage_s / batch_s)))
    reason = f"{batches * rows * seq_len:,} tokens, {facts.time_in_words(1)} at most; more hardly change the choice"
    return Setting("search.scoring_batches", batches, reason)
