"""What the rules look at, and what they return. Light."""

from dataclasses import dataclass, field

from pydantic import JsonValue

from components.core.model.architecture import Architecture
from components.core.training.step_memory import PROCESS_BYTES
from components.data.data_facts import DataFacts
from components.search.config import Limits
from components.search.costs.work_time import Computer

CPU_STAGE_S, GPU_STAGE_S = 480, 4 * 3600
"""Time that a training may take at most."""
MEMORY_SHARE = 0.8
"""Share of the memory of a machine or a device that is counted on."""
CPU_MICRO_TOKENS = 2048
"""Tokens of a micro batch on a CPU: enough for large matrices, few enough for memory."""
PROMPT_TOKENS = 128
"""Length that a prompt is taken to have where nothing tells it."""
DEFAULT_CONTEXT = 2048
"""Tokens of a text where a configuration does not tell for how long ones a model was made."""


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
        limits: the budget of the child; without any, or without a corpus, the parent itself is trained.
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
    limits: Limits = field(default_factory=Limits)
    machine: str = "this machine"

    @property
    def student(self) -> Architecture:
        """What is trained after the search: a model of about the child's size."""
        return stand_in(self.parent, self.limits) if self.data.corpus else self.parent

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


def stand_in(parent: Architecture, limits: Limits) -> Architecture:
    """The parent's first layers, as many as the tightest limit leaves, and one at least."""
    layers = len(parent.blocks)
    counts = [layers]
    for name in ("latency_ms", "request_ms", "time_to_first_token_ms"):
        limit = getattr(limits, name)
        if isinstance(limit, str):
            counts.append(round(layers * float(limit.removesuffix("%")) / 100))
    if isinstance(limits.tokens_per_s, str):
        counts.append(round(layers * 100 / float(limits.tokens_per_s.removesuffix("%"))))
    most = limits.absolute("parameters", parent.parameters)
    if most is not None:
        fitting = (n for n in range(1, layers + 1) if first_layers(parent, n).parameters <= most)
        counts.append(max(fitting, default=1))
    return first_layers(parent, max(1, min(counts)))


def first_layers(parent: Architecture, count: int) -> Architecture:
    """A model of the parent's first layers."""
    numbers = None if parent.numbers is None else parent.numbers[:count]
    return parent.model_copy(update={"blocks": parent.blocks[:count], "numbers": numbers})


def left_out(stages: tuple[str, ...], why: str) -> list[Setting]:
    """Stages that there is no data for."""
    return [Setting(stage, None, f"left out: {why}") for stage in stages]


def product_dtype(computer: Computer, stored: str) -> Setting:
    """Type of matrix products: the faster one; the key is that of any training."""
    fast, slow = computer.flops("bfloat16"), computer.flops("float32")
    dtype = "bfloat16" if fast > slow else "float32"
    rates = f"{gflops(fast)} GFLOPS in bfloat16, {gflops(slow)} in float32"
    reason = f"{computer.device.name} multiplies at {rates}"
    return Setting("dtype", dtype, f"{reason}; weights and optimizer state are float32 all the same")


def gflops(flops: float) -> str:
    """Billions of operations a second, with a digit behind the point where they are few."""
    return f"{flops / 1e9:,.1f}" if flops < 10e9 else f"{flops / 1e9:,.0f}"


def power_of_two(value: int) -> int:
    """The largest power of two that is no larger, at least 1."""
    return 1 << (max(1, value).bit_length() - 1)


def rounded_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def two_digits(value: float) -> float:
    """A number with two significant digits."""
    return float(f"{value:.1e}")
