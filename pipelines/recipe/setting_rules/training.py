"""The rules of trainings: learning rates, lengths of rows, batches, steps. Light.

Papers: Puzzle is arXiv 2411.19146, Llama-Nemotron arXiv 2505.00949.
"""

import itertools
import math

from components.core.model.architecture import Architecture
from components.core.training.step_memory import Step, step_memory
from components.data.data_facts import ChatFacts, CorpusFacts
from components.search.costs.work_time import TRAINED
from pipelines.recipe.setting_rules.facts import CPU_MICRO_TOKENS, Facts, Setting, power_of_two, rounded_up, two_digits

PRETRAINING_RATES = (
    (2e6, 2e-3),
    (125e6, 6e-4),
    (350e6, 3e-4),
    (760e6, 2.5e-4),
    (1.3e9, 2e-4),
    (2.7e9, 1.6e-4),
    (6.7e9, 1.2e-4),
    (13e9, 1e-4),
    (175e9, 6e-5),
)
"""Parameters and peak learning rate. Source: arXiv 2005.14165, table 2.1; the first pair is the demo's recipe."""
DISTILLED, CONTINUED = 1 / 2, 1 / 6
"""Share of that rate for a child that begins with its parent's weights, and for one that was distilled."""
SFT_RATE, SFT_PARAMETERS = 1e-4, 8e9
"""Learning rate of LN-Nano's first stage (Llama-Nemotron, section 4), and its parameters."""
RL_RATE, RL_PARAMETERS = 1e-6, 7e9
"""Learning rate of the policy of DeepSeekMath (arXiv 2402.03300, section 4.2), and its parameters."""
MAX_EPOCHS = 4
"""Times that text is repeated: as good as new text up to here (arXiv 2305.16264); LN-Nano's SFT has 4 epochs too."""
MAX_DISTILLED_TOKENS = 720_000_000
"""Where the paper's 49B child has 97.8 % of its parent (Puzzle, table 6): more has its own price."""
MIN_STEPS, MIN_ROWS = 100, 4
"""Steps of a training, of which a tenth is warm-up; rows of a step."""
MAX_BATCH_TOKENS = 500_000
"""Tokens of a step. Source: arXiv 2005.14165, table 2.1, for up to 760 M parameters."""
MAX_SFT_ROWS = 256
"""Rows of a step of SFT. Source: Llama-Nemotron, section 4."""
CPU_SEQ_LEN, GPU_SEQ_LEN = 512, 4096
"""Longest row of text: attention over packed rows is computed with a mask of all pairs. The paper has up to 8192."""
LENGTH_MULTIPLE = 64


def pretraining_rate(parameters: int) -> float:
    """Peak learning rate of a new model: a line through the logarithms of `PRETRAINING_RATES`, level outside."""
    pairs = PRETRAINING_RATES
    if parameters <= pairs[0][0]:
        return pairs[0][1]
    for (low, high_rate), (high, low_rate) in itertools.pairwise(pairs):
        if parameters <= high:
            done = math.log(parameters / low) / math.log(high / low)
            return float(high_rate * (low_rate / high_rate) ** done)
    return pairs[-1][1]


def learning_rates(parameters: int) -> list[Setting]:
    """Peak learning rates of all trainings by the parent's parameters."""
    new = pretraining_rate(parameters)
    size = f"{parameters / 1e6:,.1f} M parameters"
    source = "arXiv 2005.14165, table 2.1"
    if parameters < PRETRAINING_RATES[1][0]:
        source = f"a line from the demo's recipe to {source}"
    table = f"the {new:.1e} that {source} has for {size}"
    sft = SFT_RATE * new / pretraining_rate(int(SFT_PARAMETERS))
    rl = RL_RATE * math.sqrt(RL_PARAMETERS / parameters)
    return [
        Setting("distill.learning_rate", two_digits(DISTILLED * new), f"half of {table}: the child is no new model"),
        Setting("pretrain.learning_rate", two_digits(CONTINUED * new), f"a sixth of {table}: its weights are good"),
        Setting(
            "sft.learning_rate",
            two_digits(sft),
            f"{SFT_RATE:g} for 8 B (arXiv 2505.00949, section 4), scaled to {size} by {source}",
        ),
        Setting(
            "rl.learning_rate",
            two_digits(rl),
            f"{RL_RATE:g} for 7 B (arXiv 2402.03300, section 4.2), scaled to {size} by the square root, which also "
            "gives the demo's 1e-4 for 0.7 M",
        ),
    ]


def learning_rate_of(stage: str, parameters: int) -> Setting:
    """The learning rate of one stage."""
    return next(found for found in learning_rates(parameters) if found.key == f"{stage}.learning_rate")


def text_seq_len(corpus: CorpusFacts, context: int, *, on_gpu: bool, counted: str = "") -> tuple[int, str]:
    """Tokens of a packed row of text: a power of two that 99 % of the documents fit, or what is worth computing.

    Args:
        corpus: has the length of documents.
        context: the longest text that the parent was made for, tokens.
        on_gpu: whether GPUs compute.
        counted: how their tokens were counted, where that was no tokenizer, for the reason.
    """
    most = min(context, GPU_SEQ_LEN if on_gpu else CPU_SEQ_LEN)
    wanted = 1 << max(7, math.ceil(math.log2(corpus.document_tokens)))
    documents = f"99 % of your documents have at most {corpus.document_tokens:,} tokens{counted}"
    if wanted <= most:
        return wanted, f"{documents}; the next power of two"
    if most == context:
        return most, f"{documents}, the parent takes {context:,}; longer ones are cut into pieces"
    return most, f"{documents}; longer rows cost more than they teach here, and are cut into pieces"


def _chat_seq_len(chats: ChatFacts, context: int) -> tuple[int, str]:
    """Tokens of a packed row of chats, so that 99 % of them are whole."""
    reason = (
        f"99 % of your {chats.num_chats:,} chats have at most {chats.chat_tokens:,} tokens (the longest "
        f"{chats.longest_chat:,}); longer ones are left out. The paper packs to 16K and more, so that no thinking is "
        "cut away (arXiv 2505.00949, section 4)"
    )
    return min(context, rounded_up(chats.chat_tokens, LENGTH_MULTIPLE)), reason


def batch_and_steps(tokens: int, seq_len: int, ranks: int, max_rows: int) -> tuple[int, int, str]:
    """Rows of a step, steps, and the reason: steps no larger than they have to be, and at least `MIN_STEPS` of them.

    Args:
        tokens: of the whole training.
        seq_len: tokens of a row.
        ranks: that each have a row at least.
        max_rows: of a step.
    """
    wanted = max(1, min(max_rows, tokens // MIN_STEPS // seq_len))
    rows = max(MIN_ROWS, ranks, power_of_two(wanted))
    steps = max(1, tokens // (rows * seq_len))
    reason = f"rows; {rows * seq_len:,} tokens a step: at least {MIN_STEPS} steps, where that leaves {MIN_ROWS} rows"
    return rows, steps, reason


def _affordable_tokens(facts: Facts, flops_a_token: float, dtype: str) -> int:
    """Tokens that a training of the longest time goes through."""
    return int(facts.stage_s * TRAINED * facts.computer.flops(dtype) / flops_a_token)


def corpus_tokens(stage: str, facts: Facts, have: int, dtype: str) -> tuple[int, str]:
    """Tokens of the distillation, or of half as long a continued pretraining, and what limits them."""
    share = 1 if stage == "distill" else 2
    flops = 6 * facts.student.parameters + (2 * facts.parent.parameters if stage == "distill" else 0)
    affordable = _affordable_tokens(facts, flops, dtype) // share
    return _training_tokens(have, affordable, MAX_DISTILLED_TOKENS, "your text", facts.time_in_words(share))


def sft_tokens(facts: Facts, have: int, dtype: str) -> tuple[int, str]:
    """Tokens of the fine-tuning, and what limits them."""
    affordable = _affordable_tokens(facts, 6 * facts.student.parameters, dtype)
    return _training_tokens(have, affordable, 1 << 62, "your chats", facts.time_in_words(1))


def _training_tokens(have: int, affordable: int, most: int, what: str, time: str) -> tuple[int, str]:
    """Tokens of a training, and what limits them.

    Args:
        have: tokens of the data.
        affordable: tokens that there is time for.
        most: tokens after which more teach little.
        what: the data, in words.
        time: how long that is, in words.
    """
    tokens, reason = min(
        (
            MAX_EPOCHS * have,
            f"{MAX_EPOCHS} times {what} ({have:,} tokens): repeated text teaches up to here (arXiv 2305.16264)",
        ),
        (affordable, time),
        (most, "where the paper's child has 97.8 % of its parent (arXiv 2411.19146, table 6)"),
    )
    return max(1, tokens), reason


def _micro_batch(
    shape: Architecture, facts: Facts, seq_len: int, rows: int, dtype: str, *, taught: bool
) -> tuple[int, bool]:
    """Rows that a rank computes at a time, and whether it has to compute activations again.

    Args:
        shape: the model that is trained, or a larger one.
        facts: have the memory.
        seq_len: tokens of a row.
        rows: rows of a rank in a step.
        dtype: of products of matrices.
        taught: whether the parent is in memory too, as the teacher.
    """
    most = rows if facts.gpus else max(1, min(rows, CPU_MICRO_TOKENS // seq_len))
    for checkpointing in (False, True):
        size = power_of_two(most)
        while size:
            step = Step(
                size,
                rows,
                seq_len,
                dtype == "bfloat16",
                max(1, facts.gpus),
                facts.process_bytes,
                checkpointing,
                on_gpu=facts.gpus > 0,
            )
            step = step.distilled_from(facts.parent, facts.stored) if taught else step
            if step_memory(shape, step).total <= facts.process_bytes:
                return size, checkpointing
            size //= 2
    return 1, True


def corpus_training_settings(
    stage: str, facts: Facts, corpus: CorpusFacts, length: tuple[int, str], dtype: Setting
) -> list[Setting]:
    """Distillation, or half as much continued pretraining."""
    tokens = corpus_tokens(stage, facts, corpus.tokens, str(dtype.value))
    return _training(stage, facts, tokens, length, dtype, MAX_BATCH_TOKENS // length[0], taught=stage == "distill")


def sft_settings(facts: Facts, chats: ChatFacts, dtype: Setting) -> list[Setting]:
    """Fine-tuning on both modes."""
    tokens = sft_tokens(facts, chats.tokens, str(dtype.value))
    return _training("sft", facts, tokens, _chat_seq_len(chats, facts.context), dtype, MAX_SFT_ROWS)


def _training(
    stage: str,
    facts: Facts,
    tokens: tuple[int, str],
    length: tuple[int, str],
    dtype: Setting,
    max_rows: int,
    *,
    taught: bool = False,
) -> list[Setting]:
    """Batch, steps, rate, precision and ranks of a training."""
    seq_len, why = length
    num_ranks = max(1, facts.gpus)
    rows, steps, batches = batch_and_steps(tokens[0], seq_len, num_ranks, max_rows)
    own = -(-rows // num_ranks)
    micro, checkpointing = _micro_batch(facts.parent, facts, seq_len, own, str(dtype.value), taught=taught)
    found = [
        Setting(f"{stage}.seq_len", seq_len, why),
        Setting(f"{stage}.num_steps", steps, f"{steps * rows * seq_len:,} tokens: {tokens[1]}"),
        Setting(f"{stage}.global_batch_size", rows, batches),
        Setting(
            f"{stage}.micro_batch_size",
            micro,
            f"as many as {facts.process_bytes / 2**30:.1f} GiB hold" + ("" if facts.gpus else ", 2,048 tokens at most"),
        ),
        learning_rate_of(stage, facts.parent.parameters),
        Setting(f"{stage}.dtype", dtype.value, dtype.reason),
    ]
    if checkpointing:
        reason = "activations of one row do not fit beside weights and optimizer state"
        found.append(Setting(f"{stage}.activation_checkpointing", True, reason))
    return [*found, *_ranks(facts, stage)]


def _ranks(facts: Facts, stage: str) -> list[Setting]:
    """Ranks of a training: one a GPU."""
    if facts.gpus < 2:
        return []
    reason = f"a rank on each of the {facts.gpus} GPUs"
    return [Setting(f"{stage}.placement", {"processes": facts.gpus, "gpus": facts.gpus}, reason)]
