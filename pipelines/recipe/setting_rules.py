"""The rules that choose a recipe's settings from the parent, the data and the machine, each with its reason. Light.

A rule is a pure function of a few facts that returns a `Setting`. `tessera init` writes them all into a recipe, and
`filled_settings` fills by them what a recipe leaves out; `tessera plan` says them again where a recipe has what they
would choose.

Papers: Puzzle is arXiv 2411.19146, Llama-Nemotron arXiv 2505.00949.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import JsonValue

from components.core.model.architecture import Architecture
from components.core.model.flops import training_flops
from components.core.training.step_memory import PROCESS_BYTES, Step, step_memory
from components.data.config import DataConfig
from components.data.data_facts import ChatFacts, CorpusFacts, DataFacts, ProblemFacts
from components.eval.config import EvalConfig
from components.search.config import Measurement
from components.search.costs.work_time import TRAINED, Computer

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
CPU_STAGE_S, GPU_STAGE_S = 480, 4 * 3600
"""Time that a training may take at most."""
RL_SHARE = 2
"""Times as long that RL may take, most of it generation."""
MIN_RL_STEPS, MIN_RL_PROMPTS = 10, 4
"""Fewest steps of RL, and fewest problems of one."""
ANSWER_SHARE = 0.6
"""Mean length of answers as a share of the longest: 0.3 to 0.7 with SmolLM2-135M on two tasks of reasoning-gym."""
MIN_PROBLEMS = 50
"""Fewest problems of a split that every model is asked: ±14 points at the most."""
CPU_SEQ_LEN, GPU_SEQ_LEN = 512, 4096
"""Longest row of text: attention over packed rows is computed with a mask of all pairs. The paper has up to 8192."""
CPU_MICRO_TOKENS = 2048
"""Tokens of a micro batch on a CPU: enough for large matrices, few enough for memory."""
MEMORY_SHARE = 0.8
"""Share of the memory of a machine or a device that is counted on."""
EMPTY_SHARE = 0.95
"""Speed-up that is aimed at, as a share of what the limit promises: measured speeds differ by 9 % within one table."""
LENGTH_MULTIPLE, ANSWER_MULTIPLE = 64, 32
PROMPT_TOKENS = 128
"""Length that a prompt is taken to have where nothing tells it."""
DEFAULT_CONTEXT = 2048
"""Tokens of a text where a configuration does not tell for how long ones a model was made."""
DEFAULT_LIMITS: Mapping[str, JsonValue] = {"latency_ms": "70%"}
FFN_FRACTIONS = (1.0, 0.5, 0.25)
BLD_FLOPS = 14
"""Operations for a weight of the parent and a token in the block library: 2 for the parent, and 6 for variants that
have twice its weights together."""
MIN_BLD_STEPS, MAX_BLD_STEPS = 10, 1000
LEARNER_SHARE = 0.5
"""Share of the memory of a process that RL's learner may take; the rest is for the engine that generates."""


@dataclass(frozen=True)
class Setting:
    """A value of a recipe.

    Attributes:
        key: dotted.
        value: as the recipe has it.
        reason: why, in a sentence without a full stop; with its source.
    """

    key: str
    value: JsonValue
    reason: str


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    Attributes:
        parent: its shape.
        stored: precision of its files.
        context: the longest text that it was made for, tokens.
        data: what the user has.
        computer: what computes: a processor, or GPUs of one node.
        gpus: GPUs of the node; 0: the processor computes.
        cores: of the processor.
        memory_bytes: memory of the node.
        machine: what times are of, in words.
    """

    parent: Architecture
    stored: str
    context: int
    data: DataFacts
    computer: Computer
    gpus: int
    cores: int
    memory_bytes: int
    machine: str = "this machine"

    @property
    def stage_s(self) -> int:
        """Time of a training."""
        return GPU_STAGE_S if self.gpus else CPU_STAGE_S

    def time_in_words(self, share: float) -> str:
        """The time of a training that may take one of so many shares."""
        return f"about {self.stage_s / 60 / share:.0f} minutes on {self.machine}"

    @property
    def process_bytes(self) -> int:
        """Memory for tensors of one process."""
        if self.gpus:
            return int(MEMORY_SHARE * self.computer.device.memory_bytes)
        return int(MEMORY_SHARE * self.memory_bytes) - PROCESS_BYTES


def all_settings(facts: Facts, limits: Mapping[str, JsonValue]) -> list[Setting]:
    """The settings of every stage that the data is enough for; `null` leaves a stage out."""
    dtype = product_dtype(facts.computer, facts.stored)
    chats, corpus, problems = facts.data.chats, facts.data.corpus, facts.data.problems
    rl = left_out(("rl",), "no chats and problems")
    if chats and problems:
        rl = rl_settings(facts, chats, problems, dtype)
    if rl[0].key == "rl":  # problems are of a recipe's section `rl`, and go with it
        problems = None
    return [
        *placement(facts),
        *targets(limits if corpus else {}, has_chats=chats is not None, has_problems=problems is not None),
        *serving_settings(facts),
        *(_text_settings(facts, corpus, dtype, limits, problems) if corpus else left_out(TEXT_STAGES, "no corpus")),
        *(sft_settings(facts, chats, dtype) if chats else left_out(("sft",), "no chats")),
        *rl,
        *eval_settings(facts, chats, corpus, problems),
        *deploy_settings(facts, chats, problems),
    ]


def ffn_fractions(parent: Architecture) -> Setting:
    """Widths of FFNs that the search offers."""
    widths = {block.intermediate_size for block in parent.blocks if isinstance(block.intermediate_size, int)}
    fractions: list[JsonValue] = [f for f in FFN_FRACTIONS if all((f * width).is_integer() for width in widths)]
    reason = "widths that the parent divides into; the paper has 9 (Puzzle, section 2)"
    return Setting("search.ffn_fractions", fractions, reason)


def power_of_two(value: int) -> int:
    """The largest power of two that is no larger, at least 1."""
    return 1 << (max(1, value).bit_length() - 1)


TEXT_STAGES = ("search", "distill", "pretrain")
"""Stages that read the corpus."""


def left_out(stages: tuple[str, ...], why: str) -> list[Setting]:
    """Stages that there is no data for."""
    return [Setting(stage, None, f"left out: {why}") for stage in stages]


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


def ranks(facts: Facts, stage: str) -> list[Setting]:
    """Ranks of a training: one a GPU."""
    if facts.gpus < 2:
        return []
    reason = f"a rank on each of the {facts.gpus} GPUs"
    return [Setting(f"{stage}.placement", {"processes": facts.gpus, "gpus": facts.gpus}, reason)]


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


def product_dtype(computer: Computer, stored: str) -> Setting:
    """Type of matrix products: the faster one; the key is that of any training."""
    fast, slow = computer.flops("bfloat16"), computer.flops("float32")
    dtype = "bfloat16" if fast > slow else "float32"
    rates = f"{gflops(fast)} GFLOPS in bfloat16, {gflops(slow)} in float32"
    reason = f"{computer.device.name} multiplies at {rates}"
    return Setting("dtype", dtype, f"{reason}; weights and optimizer state are float32 all the same")


def serving_settings(facts: Facts) -> list[Setting]:
    """Precision of the engines, where that of the parent's files is the slower one."""
    if served_dtype(facts) == facts.stored:
        return []
    rates = f"{gflops(facts.computer.flops(facts.stored))} GFLOPS in {facts.stored}"
    rates = f"{rates}, {gflops(facts.computer.flops('float32'))} in float32"
    return [Setting("serving.dtype", "float32", f"vLLM too multiplies at {rates} on {facts.computer.device.name}")]


def served_dtype(facts: Facts) -> str:
    """Precision of the engines: that of the parent's files, unless a processor is faster in float32.

    Float32 moves twice the bytes. It is faster where the processor has no instructions for bfloat16.
    """
    if facts.gpus or facts.stored == "float32":
        return facts.stored
    times = {dtype: answers_s(facts, dtype, 1, prompt_tokens=PROMPT_TOKENS) for dtype in (facts.stored, "float32")}
    return min(times, key=lambda dtype: times[dtype])


def answers_s(
    facts: Facts, dtype: str, number: int, *, at_once: int = 8, prompt_tokens: int, max_tokens: int = PROMPT_TOKENS
) -> float:
    """Time in which one device gives answers with the parent.

    Args:
        facts: of device and parent.
        dtype: that the engine computes in.
        number: of answers.
        at_once: answers of a batch.
        prompt_tokens: tokens of a prompt.
        max_tokens: tokens of the longest answer.
    """
    known, tokens = facts.computer.computed_dtype(dtype), max(2, round(ANSWER_SHARE * max_tokens))
    load = Measurement(batch_size=at_once, prompt_tokens=prompt_tokens, new_tokens=tokens, dtype=known)
    return replace(facts.computer, count=1).generation_s(facts.parent, load, number)


def gflops(flops: float) -> str:
    """Billions of operations a second, with a digit behind the point where they are few."""
    return f"{flops / 1e9:,.1f}" if flops < 10e9 else f"{flops / 1e9:,.0f}"


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


def chat_seq_len(chats: ChatFacts, context: int) -> tuple[int, str]:
    """Tokens of a packed row of chats, so that 99 % of them are whole."""
    reason = (
        f"99 % of your {chats.num_chats:,} chats have at most {chats.chat_tokens:,} tokens (the longest "
        f"{chats.longest_chat:,}); longer ones are left out. The paper packs to 16K and more, so that no thinking is "
        "cut away (arXiv 2505.00949, section 4)"
    )
    return min(context, rounded_up(chats.chat_tokens, LENGTH_MULTIPLE)), reason


def answer_length(answer_tokens: int, prompt_tokens: int, context: int) -> int:
    """Longest answer: with its thinking, as far as the context has room for it behind a prompt.

    Args:
        answer_tokens: that 99 % of the answers in the chats have at most.
        prompt_tokens: of a prompt.
        context: the longest text that the model takes, tokens.
    """
    return min(rounded_up(answer_tokens, ANSWER_MULTIPLE), max(1, context - prompt_tokens))


def _answer_length(facts: Facts, chats: ChatFacts, prompt_tokens: int) -> tuple[int, str]:
    """Longest answer by the chats, and the reason."""
    length = answer_length(chats.answer_tokens, prompt_tokens, facts.context)
    return length, f"99 % of the answers in your chats have at most {chats.answer_tokens:,} tokens, thinking included"


def micro_batch(
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


def affordable_tokens(facts: Facts, flops_a_token: float, dtype: str) -> int:
    """Tokens that a training of the longest time goes through."""
    return int(facts.stage_s * TRAINED * facts.computer.flops(dtype) / flops_a_token)


def corpus_tokens(stage: str, facts: Facts, have: int, dtype: str) -> tuple[int, str]:
    """Tokens of the distillation, or of half as long a continued pretraining, and what limits them."""
    share = 1 if stage == "distill" else 2
    flops = (8 if stage == "distill" else 6) * facts.parent.parameters  # the child is no larger; 2 for the teacher
    affordable = affordable_tokens(facts, flops, dtype) // share
    return training_tokens(have, affordable, MAX_DISTILLED_TOKENS, "your text", facts.time_in_words(share))


def sft_tokens(facts: Facts, have: int, dtype: str) -> tuple[int, str]:
    """Tokens of the fine-tuning, and what limits them."""
    affordable = affordable_tokens(facts, 6 * facts.parent.parameters, dtype)
    return training_tokens(have, affordable, 1 << 62, "your chats", facts.time_in_words(1))


def training_tokens(have: int, affordable: int, most: int, what: str, time: str) -> tuple[int, str]:
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


def _text_settings(
    facts: Facts,
    corpus: CorpusFacts,
    dtype: Setting,
    limits: Mapping[str, JsonValue],
    problems: ProblemFacts | None,
) -> list[Setting]:
    """Search, distillation and continued pretraining."""
    seq_len, why = text_seq_len(corpus, facts.context, on_gpu=facts.gpus > 0)
    return [
        *search_settings(facts, seq_len, why, str(dtype.value), limits, problems),
        *_corpus_training("distill", facts, corpus, (seq_len, why), dtype),
        *_corpus_training("pretrain", facts, corpus, (seq_len, why), dtype),
    ]


def search_settings(
    facts: Facts,
    seq_len: int,
    why: str,
    dtype: str,
    limits: Mapping[str, JsonValue],
    problems: ProblemFacts | None,
) -> list[Setting]:
    """The search: space, budget, calibration, and how much the block library is trained."""
    rows = calibration_rows(seq_len, on_gpu=facts.gpus > 0)
    tokens = rows * seq_len
    load, load_reason = workload(facts, problems)
    if served_dtype(facts) != facts.stored:
        load["dtype"] = "float32"
        load_reason += "; as precise as it is served"
    return [
        Setting("search.limits", dict(limits), "the budget of the child, shares of the parent's own cost"),
        ffn_fractions(facts.parent),
        Setting("search.shards", max(1, facts.gpus), "one for each device that can build a part of the library"),
        Setting("search.dtype", dtype, "the faster one, as in training"),
        Setting("search.seq_len", seq_len, why),
        Setting("search.batch_size", rows, f"{tokens:,} tokens a batch"),
        library_steps(facts, tokens, dtype),
        Setting("search.measurement", load, load_reason),
    ]


def workload(facts: Facts, problems: ProblemFacts | None) -> tuple[dict[str, JsonValue], str]:
    """The load that a model is made for, and why."""
    load: dict[str, JsonValue] = {"batch_size": 64 if facts.gpus else 8}
    reason = "users at the same time, a guess"
    if problems is not None:
        load["prompt_tokens"] = problems.prompt_tokens
        reason += "; prompts as long as 99 % of your problems"
    load["new_tokens"] = 64 if facts.gpus else 16
    return load, reason


def calibration_rows(seq_len: int, *, on_gpu: bool) -> int:
    """Rows of a batch of the search."""
    return max(1, CPU_MICRO_TOKENS // seq_len) * (8 if on_gpu else 1)


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


def _corpus_training(
    stage: str, facts: Facts, corpus: CorpusFacts, length: tuple[int, str], dtype: Setting
) -> list[Setting]:
    """Distillation, or half as much continued pretraining."""
    tokens = corpus_tokens(stage, facts, corpus.tokens, str(dtype.value))
    return _training(stage, facts, tokens, length, dtype, MAX_BATCH_TOKENS // length[0], taught=stage == "distill")


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
    micro, checkpointing = micro_batch(facts.parent, facts, seq_len, own, str(dtype.value), taught=taught)
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
    return [*found, *ranks(facts, stage)]


def sft_settings(facts: Facts, chats: ChatFacts, dtype: Setting) -> list[Setting]:
    """Fine-tuning on both modes."""
    tokens = sft_tokens(facts, chats.tokens, str(dtype.value))
    return _training("sft", facts, tokens, chat_seq_len(chats, facts.context), dtype, MAX_SFT_ROWS)


def rl_settings(facts: Facts, chats: ChatFacts, problems: ProblemFacts, dtype: Setting) -> list[Setting]:
    """GRPO."""
    length, why = _answer_length(facts, chats, problems.prompt_tokens)
    steps, prompts, samples, rates = rollout_settings(facts, problems.prompt_tokens, length, str(dtype.value))
    num_prompts, num_samples, num_steps = (int(str(setting.value)) for setting in (prompts, samples, steps))
    row = problems.prompt_tokens + length
    most = max(1, min(num_prompts * num_samples, CPU_MICRO_TOKENS * (8 if facts.gpus else 1) // row))
    micro = _learner_batch(facts, row, most, str(dtype.value))
    if micro is None:
        size = f"{facts.parent.parameters / 1e9:,.1f} B parameters"
        return left_out(("rl",), f"its learner is one process, and the state of {size} does not fit beside an engine")
    drawn = min(problems.num_problems, num_steps * num_prompts)
    return [
        Setting("rl.max_tokens", length, why),
        steps,
        prompts,
        samples,
        Setting("rl.max_problems", drawn, f"of your {problems.num_problems:,}; a step takes {num_prompts}"),
        rates,
        Setting("rl.micro_batch_size", micro, f"answers and prompts of up to {row:,} tokens"),
        learning_rate_of("rl", facts.parent.parameters),
        Setting("rl.dtype", dtype.value, dtype.reason),
    ]


def rollout_settings(
    facts: Facts, prompt_tokens: int, max_tokens: int, dtype: str
) -> tuple[Setting, Setting, Setting, Setting]:
    """Steps of RL, problems of a step, answers to each, and answers by which pass rates are measured.

    Args:
        facts: of device and parent.
        prompt_tokens: tokens of a prompt.
        max_tokens: tokens of an answer.
        dtype: of the learner.
    """
    steps, prompts, samples, rates = (100, 72, 16, 8) if facts.gpus else (30, 8, 8, 2)

    def affordable(prompts: int) -> int:
        answers = prompts * samples
        step_s = answers_s(
            facts,
            served_dtype(facts),
            answers + prompts * rates,
            at_once=answers,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
        )
        row = prompt_tokens + round(ANSWER_SHARE * max_tokens)
        flops = training_flops(facts.parent, answers * row, row)
        step_s += replace(facts.computer, count=1).computing_s(flops, dtype)
        return int(RL_SHARE * facts.stage_s / step_s)

    while affordable(prompts) < MIN_RL_STEPS and prompts > MIN_RL_PROMPTS:
        prompts //= 2
    steps = max(MIN_RL_STEPS, min(steps, affordable(prompts)))
    paper = "arXiv 2505.00949, section 5.1"
    fewer = "as the paper" if facts.gpus else "the paper has {}; fewer on a CPU"
    number = f"the paper's figure 5 shows about 500; at most {facts.time_in_words(1 / RL_SHARE)}"
    number += f", but {MIN_RL_STEPS} steps at least"
    return (
        Setting("rl.num_steps", steps, number),
        Setting("rl.prompts_per_step", prompts, f"{fewer.format(72)} ({paper})"),
        Setting("rl.samples_per_prompt", samples, f"{fewer.format(16)} ({paper})"),
        Setting("rl.pass_rate_samples", rates, f"{fewer.format(8)} ({paper})"),
    )


def _learner_batch(facts: Facts, row: int, most: int, dtype: str) -> int | None:
    """Answers that RL's learner computes at a time; None where one does not fit."""
    for size in range(most, 0, -1):
        step = Step(size, 2 * most, row, dtype == "bfloat16", on_gpu=facts.gpus > 0)
        if step_memory(facts.parent, step).total <= LEARNER_SHARE * facts.process_bytes:
            return size
    return None


def eval_settings(
    facts: Facts, chats: ChatFacts | None, corpus: CorpusFacts | None, problems: ProblemFacts | None
) -> list[Setting]:
    """How every model is asked, and the text for perplexity."""
    if corpus is None and problems is None:
        return left_out(("eval",), "neither a corpus nor problems")
    found = []
    if chats is not None and problems is not None:
        length, why = _answer_length(facts, chats, problems.prompt_tokens)
        number, samples = (250, 4) if facts.gpus else (100, 2)
        models = 3 + 3 * (corpus is not None)  # with a corpus there are a searched, a distilled and a pretrained one
        at_once, prompt = EvalConfig().concurrency, problems.prompt_tokens
        batch_s = answers_s(
            facts, served_dtype(facts), at_once, at_once=at_once, prompt_tokens=prompt, max_tokens=length
        )
        problem_s = batch_s * models * (samples + 1) / at_once
        number = max(MIN_PROBLEMS, min(number, int(facts.stage_s / problem_s)))
        number = min(number, max(1, round(DataConfig().test_fraction * problems.num_problems)))
        reason = f"of each split; ±{98 / math.sqrt(number):.0f} points at the most; all {models} models answer "
        reason += f"within {facts.time_in_words(1)}, but {MIN_PROBLEMS} at least where there are as many"
        found += [
            Setting("eval.max_tokens", length, why),
            Setting("eval.num_problems", number, reason),
            Setting(
                "eval.num_samples", samples, "answers that differ; the paper has up to 16 (arXiv 2505.00949, section 7)"
            ),
        ]
    if corpus is not None:
        seq_len, why = text_seq_len(corpus, facts.context, on_gpu=facts.gpus > 0)
        found.append(Setting("eval.held_out.seq_len", seq_len, why))
        load, _ = workload(facts, problems)
        found.append(Setting("eval.workload", load, "the load of the search: limits and target are about it"))
    if facts.gpus > 1:
        found.append(Setting("eval.placement", {"gpus": facts.gpus}, "a replica on each GPU"))
    return found


def deploy_settings(facts: Facts, chats: ChatFacts | None, problems: ProblemFacts | None) -> list[Setting]:
    """Gate and smoke test."""
    if chats is None:
        return left_out(("deploy",), "a model without chats has not learned the switch that the smoke test asks for")
    length, why = _answer_length(facts, chats, problems.prompt_tokens if problems else PROMPT_TOKENS)
    found = [Setting("deploy.max_tokens", length, why)]
    if problems is not None:
        found += [
            Setting("deploy.gate.min_format", 0.9, "a model that loses its format is not promoted"),
            Setting("deploy.questions", [problems.question], "a short one of your problems"),
        ]
    return found


def rounded_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def two_digits(value: float) -> float:
    """A number with two significant digits."""
    return float(f"{value:.1e}")
