"""What a recipe leaves out where its parent is a folder of the user's own, by the rules of `tessera init`. Light.

`tessera init` measures the machine and reads all data. A recipe is loaded by every command, so here the sizes of the
files stand for their tokens, and a device that is known from its data sheet stands for the machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from components.core.base.config import Config
from components.core.model.accelerators import DEVICES
from components.core.model.architecture import Architecture
from components.core.training.train_config import TrainConfig
from components.data.data_facts import CorpusFacts, DataFacts
from components.deploy.config import DeployConfig
from components.eval.config import EvalConfig
from components.rl.config import RlConfig
from components.search.config import Limits, SearchConfig, Space
from components.search.costs.work_time import Computer
from pipelines.recipe.setting_rules.facts import (
    CPU_MICRO_TOKENS,
    PROMPT_TOKENS,
    Facts,
    Setting,
    power_of_two,
    product_dtype,
    rounded_up,
)
from pipelines.recipe.setting_rules.generation import answer_length, held_out_batches, rollout_settings
from pipelines.recipe.setting_rules.search import calibration_rows, ffn_fractions, library_steps, scoring_batches
from pipelines.recipe.setting_rules.training import (
    LENGTH_MULTIPLE,
    MAX_BATCH_TOKENS,
    MAX_SFT_ROWS,
    MIN_ROWS,
    batch_and_steps,
    corpus_tokens,
    learning_rates,
    sft_tokens,
    text_seq_len,
)
from pipelines.recipe.source_files import SourceSize

TEXT_BYTES_A_TOKEN, CHAT_BYTES_A_TOKEN = 4, 3
"""Of a text, and of a row of chats in JSON: English texts have more than four in a token of usual vocabularies."""
STEP_TOKENS = 4096
"""Tokens of a step where nothing is known of the data, or the recipe sets how many steps there are."""
USUAL_GPU = DEVICES["H100"]
USUAL_PROCESSOR = DEVICES["CPU"].model_copy(update={"name": "a processor without instructions for bfloat16"})
USUAL_THREADS = 2
"""Threads that a stage has by default."""
NODE_GPUS = 8
"""GPUs of a node at most: a step has a row for each, so that a recipe is the same on one and on eight."""


@dataclass(frozen=True)
class ParentFacts:
    """What is looked at where a recipe leaves keys out: it is read in a moment, and is the same on every machine.

    Attributes:
        shape: of the parent.
        stored: precision of its files.
        context: the longest text that it was made for, tokens.
        corpus: size of the user's text; None where there is none, or it is not known.
        chats: size of the user's chats, likewise.
        problems: size of the user's problems, likewise.
        max_model_len: longest prompt with its answer, tokens, that the server of a section takes, by section, where the
            recipe limits it.
        on_gpu: sections of the recipe whose placement has GPUs.
        limits: the budget of the child.
    """

    shape: Architecture
    stored: str
    context: int
    corpus: SourceSize | None = None
    chats: SourceSize | None = None
    problems: SourceSize | None = None
    max_model_len: Mapping[str, int] = field(default_factory=dict)
    on_gpu: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)

    def usual(self, section: str) -> Facts:
        """The facts that `tessera init` would have, with a usual device of the kind that a section is placed on."""
        gpus = int(section in self.on_gpu)
        return Facts(
            parent=self.shape,
            stored=self.stored,
            context=self.context,
            data=DataFacts(corpus=self._corpus_facts()),
            computer=Computer(USUAL_GPU) if gpus else Computer(USUAL_PROCESSOR, USUAL_THREADS),
            gpus=gpus,
            cores=USUAL_THREADS,
            memory_bytes=0,
            limits=self.limits,
            machine="an H100" if gpus else f"{USUAL_THREADS} threads",
        )

    @property
    def chat_tokens(self) -> int | None:
        """Tokens that nearly every chat has at most; None where that is not known."""
        return None if self.chats is None else -(-self.chats.row_bytes // CHAT_BYTES_A_TOKEN)

    def longest_text(self, section: str) -> int:
        """Tokens of a prompt with its answer that the model takes in a section."""
        return min(self.context, self.max_model_len.get(section, self.context))

    def prompt_tokens(self, section: str) -> int:
        """Tokens of a prompt: no more than the row of a problem has, and at most half of what the model takes."""
        row = PROMPT_TOKENS if self.problems is None else -(-self.problems.row_bytes // CHAT_BYTES_A_TOKEN)
        return min(row, self.longest_text(section) // 2)

    def _corpus_facts(self) -> CorpusFacts | None:
        if self.corpus is None:
            return None
        return CorpusFacts(
            tokens=max(1, self.corpus.num_bytes // TEXT_BYTES_A_TOKEN),
            estimated=True,
            document_tokens=-(-self.corpus.row_bytes // TEXT_BYTES_A_TOKEN),
        )


def filled_settings(sections: Mapping[str, Config | None], facts: ParentFacts) -> list[Setting]:
    """What follows from the parent, the sizes of the data, the kind of device, and what a recipe sets itself.

    A recipe that leaves such a key out has this value, see `schema.fill_left_out`. Of a placement nothing counts but
    whether it has GPUs: stages with other settings are other computations.

    Args:
        sections: of the recipe by name; None where the stage is left out.
        facts: of the user's own parent and data.
    """
    rates = {rate.key.partition(".")[0]: rate for rate in learning_rates(facts.shape.parameters)}
    found = [rate for stage, rate in rates.items() if sections.get(stage) is not None]
    for stage in ("distill", "pretrain", "sft"):
        section = sections.get(stage)
        if isinstance(section, TrainConfig):
            found += _training(stage, section, facts)
    for name, section in sections.items():
        if isinstance(section, SearchConfig):
            found += _search(section, facts)
        elif isinstance(section, RlConfig):
            found += _rl(name, section, facts)
        elif isinstance(section, EvalConfig):
            found += [*_answer_length(name, facts), *_held_out(name, section, facts.usual(name))]
        elif isinstance(section, DeployConfig):
            found += _answer_length(name, facts)
    return found


def _training(stage: str, section: TrainConfig, facts: ParentFacts) -> Iterator[Setting]:
    """Precision, length of rows, rows of a step and of a process at a time, and steps."""
    usual = facts.usual(stage)
    dtype = _dtype(stage, usual)
    yield dtype
    seq_len, max_rows = section.seq_len, MAX_SFT_ROWS
    tokens: tuple[int, str] | None = None
    lengths = list(_chat_length(facts) if stage == "sft" else _seq_len(stage, usual))
    yield from lengths
    if lengths and "seq_len" not in section.model_fields_set:
        seq_len = int(str(lengths[0].value))
    precision = str(section.dtype or dtype.value)
    if stage == "sft":
        tokens = sft_tokens(usual, facts.chats.num_bytes // CHAT_BYTES_A_TOKEN, precision) if facts.chats else None
    elif usual.data.corpus is not None:
        tokens = corpus_tokens(stage, usual, usual.data.corpus.tokens, precision)
        max_rows = MAX_BATCH_TOKENS // seq_len
    length = f"rows of {seq_len:,} tokens"
    if tokens is not None and "num_steps" not in section.model_fields_set:
        rows, _, reason = batch_and_steps(tokens[0], seq_len, NODE_GPUS if usual.gpus else 1, max_rows)
    else:
        rows = max(MIN_ROWS, power_of_two(STEP_TOKENS // seq_len))
        reason = f"{length}: {STEP_TOKENS:,} tokens a step, and {MIN_ROWS} rows at least"
    yield Setting(f"{stage}.global_batch_size", rows, reason)
    chosen = section.global_batch_size if "global_batch_size" in section.model_fields_set else rows
    reason = f"{length}: {CPU_MICRO_TOKENS:,} tokens at most, which fit most devices; the result is the same"
    yield Setting(f"{stage}.micro_batch_size", power_of_two(min(chosen, CPU_MICRO_TOKENS // seq_len)), reason)
    if tokens is not None:
        steps = max(1, tokens[0] // (chosen * seq_len))
        yield Setting(f"{stage}.num_steps", steps, f"{steps * chosen * seq_len:,} tokens: {tokens[1]}")


def _search(section: SearchConfig, facts: ParentFacts) -> Iterator[Setting]:
    """Widths of the space, calibration, and how much the block library is trained."""
    usual = facts.usual("search")
    if section.task.num_problems:
        yield from _answer_length("search.task", facts)
    space: Space = section
    if not section.intermediate_sizes:
        fractions = ffn_fractions(facts.shape)
        yield fractions
        if "ffn_fractions" not in section.model_fields_set:
            space = section.model_copy(update={"ffn_fractions": fractions.value})
    dtype = _dtype("search", usual)
    yield dtype
    lengths = list(_seq_len("search", usual))
    if not lengths:
        return
    yield from lengths
    seq_len = section.seq_len if "seq_len" in section.model_fields_set else int(str(lengths[0].value))
    rows = calibration_rows(seq_len, on_gpu=usual.gpus > 0)
    yield Setting("search.batch_size", rows, f"{rows * seq_len:,} tokens a batch")
    chosen = section.batch_size if "batch_size" in section.model_fields_set else rows
    precision = section.dtype if "dtype" in section.model_fields_set else str(dtype.value)  # it has a default
    yield library_steps(usual, chosen * seq_len, precision)
    yield scoring_batches(usual, space, chosen, seq_len, precision)


def _rl(name: str, section: RlConfig, facts: ParentFacts) -> Iterator[Setting]:
    """Rollouts, precision, and the length of answers with how many of them the learner computes at a time."""
    usual, max_tokens = facts.usual(name), section.max_tokens
    lengths = list(_answer_length(name, facts))
    if lengths and "max_tokens" not in section.model_fields_set:
        max_tokens = int(str(lengths[0].value))
    dtype, prompt_tokens = _dtype(name, usual), facts.prompt_tokens(name)
    yield from rollout_settings(usual, prompt_tokens, max_tokens, str(section.dtype or dtype.value))
    yield dtype
    yield from lengths
    if lengths:
        row = prompt_tokens + max_tokens
        reason = (
            f"answers with their prompts of up to {row:,} tokens: {CPU_MICRO_TOKENS:,} tokens at most, which fit most "
            "devices; the result is the same"
        )
        yield Setting(f"{name}.micro_batch_size", max(1, CPU_MICRO_TOKENS // row), reason)


def _answer_length(section: str, facts: ParentFacts) -> Iterator[Setting]:
    """Tokens of an answer, so that no thinking is cut away: as many as a chat has, whose answer is a part of it."""
    if facts.chats is None or facts.chat_tokens is None:
        return
    longest, tokens = facts.longest_text(section), facts.chat_tokens
    length = answer_length(tokens, facts.prompt_tokens(section), longest)
    reason = (
        f"99 % of the rows of your chats have at most {facts.chats.row_bytes:,} bytes, taken as {tokens:,} tokens, and "
        "an answer with its thinking has no more; tessera init counts the answers"
    )
    if length < tokens:
        reason = f"{length:,} of the {longest:,} tokens that the model takes are left behind a prompt: {reason}"
    yield Setting(f"{section}.max_tokens", length, reason)


def _dtype(section: str, usual: Facts) -> Setting:
    """Type of matrix products, by the kind of device."""
    chosen = product_dtype(usual.computer, usual.stored)
    return Setting(f"{section}.dtype", chosen.value, f"{chosen.reason}; tessera init measures this machine")


def _seq_len(section: str, usual: Facts) -> Iterator[Setting]:
    """Tokens of a row of text, where something is known of the text."""
    if usual.data.corpus is not None:
        counted = " by their bytes; tessera init counts them"
        seq_len, why = text_seq_len(usual.data.corpus, usual.context, on_gpu=usual.gpus > 0, counted=counted)
        yield Setting(f"{section}.seq_len", seq_len, why)


def _held_out(section: str, config: EvalConfig, usual: Facts) -> Iterator[Setting]:
    """Tokens of a row of text for the perplexity, and how many batches of them."""
    for length in _seq_len(f"{section}.held_out", usual):
        yield length
        chosen = config.held_out.seq_len if "seq_len" in config.held_out.model_fields_set else int(str(length.value))
        batches = held_out_batches(usual, chosen)
        yield Setting(f"{section}.held_out.num_batches", batches.value, batches.reason)


def _chat_length(facts: ParentFacts) -> Iterator[Setting]:
    """Tokens of a packed row of chats, so that nearly all of them are whole."""
    if facts.chats is None or facts.chat_tokens is None:
        return
    tokens = facts.chat_tokens
    reason = (
        f"99 % of the rows of your chats have at most {facts.chats.row_bytes:,} bytes, taken as {tokens:,} tokens, so "
        "that no thinking is cut away (arXiv 2505.00949, section 4); tessera init counts them"
    )
    yield Setting("sft.seq_len", min(facts.context, rounded_up(tokens, LENGTH_MULTIPLE)), reason)
