"""Settings of the stages of the search."""

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from components.core.base.config import Config
from components.core.base.suggestions import nearest
from components.core.model.accelerators import DEVICES, Device
from components.core.serving.load_profile import LoadProfile

TextMeasure = Literal["kl", "lm_loss", "cosine", "top1"]
"""How far predictions have moved, mean over positions: KL(parent || child) and growth of the next-token loss in nats,
1 - cos of the last hidden states, share of positions whose likeliest token is another."""
Measure = Literal[TextMeasure, "accuracy"]
"""The same, and the share of a task set's problems that are lost."""
MEASURES: tuple[TextMeasure, ...] = get_args(TextMeasure)

PERCENT = r"(?=.*[1-9])\d+(\.\d+)?%"
"""A share above 0."""


LayerRange = Annotated[str, BeforeValidator(str), Field(pattern=r"^\d+(-\d+)?$")]
"""A layer of the parent, counted from 0, or the first and the last of several."""
Settings = TypeVar("Settings", bound=Config)


class Limits(Config):
    """The budget of the child: a number is absolute, text such as `60%` a share of the parent's own cost."""

    parameters: int | str | None = None
    """Parameters of the child, embeddings included."""
    kv_bytes_per_token: int | str | None = None
    """KV cache of one token in all layers, bytes, at 2 bytes a value."""
    attention_layers: int | str | None = None
    """Layers that keep an attention."""
    weight_bytes: int | str | None = None
    """Weights at the served precision, bytes, on all devices together."""
    memory_bytes: int | str | None = None
    """Weights, KV cache of `measurement.cached_tokens` and activations, bytes, on all devices together."""
    latency_ms: float | str | None = None
    """One decode step of the batch, milliseconds."""
    time_to_first_token_ms: float | str | None = None
    """From the prompts of the batch to its first tokens, milliseconds."""
    request_ms: float | str | None = None
    """From the prompts of the batch to its last tokens, milliseconds."""
    tokens_per_s: float | str | None = None
    """New tokens a second of the whole batch, prefill included: the least, such as `180%`."""

    @field_validator("*")
    @classmethod
    def _positive_or_percent(cls, value: float | str | None) -> float | str | None:
        wrong = not re.fullmatch(PERCENT, value) if isinstance(value, str) else value is not None and value <= 0
        if wrong:
            raise ValueError("a limit is a positive number, or a share of the parent such as '60%'")
        return value

    def absolute(self, resource: str, parents: float) -> float | None:
        """One limit as a number, shares taken of the parent's own cost; None where it is not set."""
        return _of_parents(getattr(self, resource), parents)

    def request_budget_ms(self, parents: float, batch_tokens: int) -> float | None:
        """The time that a batch may take for `tokens_per_s`; None where that is not set.

        Args:
            parents: time that the parent takes for the batch, milliseconds.
            batch_tokens: new tokens of the batch.
        """
        if self.tokens_per_s is None:
            return None
        least = _of_parents(self.tokens_per_s, 1000 * batch_tokens / parents)
        assert least is not None
        return 1000 * batch_tokens / least


def _of_parents(limit: float | str | None, parents: float) -> float | None:
    """A limit as a number: text is a share of the parent's."""
    return float(limit.removesuffix("%")) / 100 * parents if isinstance(limit, str) else limit


Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Without = Literal["own", "linear", "no_op"]


class LayerRules(Config):
    """Space of some layers; a setting that is left out is that of all layers."""

    ffn_fractions: tuple[Fraction, ...] | None = None
    """FFN widths, as fractions of the parent's intermediate size."""
    intermediate_sizes: tuple[Count, ...] | None = None
    """FFN widths, channels."""
    num_key_value_heads: tuple[Count, ...] | None = None
    """KV heads, divisors of the parent's."""
    no_op_attention: bool | None = None
    """Whether the attention may go."""
    no_op_ffn: bool | None = None
    """Whether the FFN may go."""
    linear_attention: bool | None = None
    """Whether the attention may become one matrix."""
    linear_ffn: bool | None = None
    """Whether the FFN may become one matrix."""
    attention: Without | Count | None = None
    """The attention that these layers will have: `own`, the parent's; `linear`; `no_op`; or so many KV heads."""
    ffn: Without | Count | None = None
    """The FFN that these layers will have, likewise; or so many channels."""


class Space(Config):
    """The sub-blocks that each layer may have. Source: arXiv 2411.19146, section 2."""

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "allow_unserved": "allow_plugin_only_blocks",
    }

    ffn_fractions: tuple[Fraction, ...] = (1.0, 0.5, 0.25)
    """FFN widths, as fractions of the parent's intermediate size; the parent's own width is always offered."""
    intermediate_sizes: tuple[Count, ...] = ()
    """More FFN widths, channels."""
    num_key_value_heads: tuple[Count, ...] | None = None
    """KV heads, divisors of the parent's; by default the largest below those, and one. The parent's own is always
    offered."""
    no_op_attention: bool = True
    """Whether a layer may lose its attention."""
    no_op_ffn: bool = True
    """Whether a layer may lose its FFN."""
    linear_attention: bool = True
    """Whether an attention may become one matrix, as if each token saw itself alone; see `allow_plugin_only_blocks`."""
    linear_ffn: bool = True
    """Whether an FFN may become one matrix; see `allow_plugin_only_blocks`."""
    allow_plugin_only_blocks: bool = False
    """Also offer what vLLM runs only with Tessera's plug-in: linear parts, and a first layer without attention."""
    layers: dict[LayerRange, LayerRules] = Field(default={})
    """Rules of single layers, by number from 0 or by range, such as `4-7`: any of the settings above but the last, or
    `attention` and `ffn` as they will be: `own`, `linear`, `no_op`, or a number of KV heads or channels."""


class Calibration(Config):
    """Packed text, and the precision in which the parent computes on it."""

    seq_len: int = Field(default=128, gt=1)
    """Tokens of a packed row."""
    batch_size: int = Field(default=16, gt=0)
    """Packed rows a batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision that the parent computes in; its weights stay in the precision of its files."""
    seed: int | None = None
    """Order of the data and all randomness; the recipe's seed where not given."""


class Measurement(LoadProfile):
    """The load that costs are for: measured in vLLM on this machine, or predicted for another device."""

    rounds: int = Field(default=7, gt=0)
    """Rounds of measuring all models in turn, each right after the parent; the median counts."""
    num_layers: int | None = Field(default=None, gt=1)
    """Layers of the measured models; by default four, or as many as hold 128 MiB, at most the parent's."""
    cached_tokens: int | None = Field(default=None, gt=0)
    """Tokens whose KV cache `memory_bytes` counts; the batch at its full length by default."""

    device: str | Device | None = None
    """A100, H100, H200, B200, L40S or CPU, or a profile of your own: times are predicted for it, not measured here."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str | Device | None) -> str | Device | None:
        if isinstance(value, str) and value not in DEVICES:
            raise ValueError(f"no such device; {nearest(value.upper(), list(DEVICES))}")
        return value

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache."""
        return self.cached_tokens or self.batch_size * (self.prompt_tokens + self.new_tokens)


class Distillation(Config):
    """Blockwise local distillation of the library. Source: arXiv 2411.19146, section 3."""

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "small_error": "skip_below_error",
    }

    num_steps: int = Field(default=40, ge=0)
    """Optimizer steps; 0 leaves every variant untrained."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of AdamW's cosine schedule."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps that climb linearly to the peak."""
    linear_batches: int = Field(default=8, ge=0)
    """Batches that linear sub-blocks are fitted to by least squares before they are trained; 0: they begin as a product
    of the parent's matrices, as in the paper."""
    resume_interval_s: float | None = Field(default=None, gt=0)
    """Seconds between resume points; where null a hundred times what the last one cost, and 30 at least."""
    skip_below_error: float = Field(default=1e-3, ge=0)
    """A variant whose first normalised error is below this is not trained."""


class Fusion(Config):
    """Which FFNs of attention-free runs are fused. Source: arXiv 2503.18908, sections 3 and 4."""

    enabled: bool = True
    """Whether to fuse at all."""
    keep_last: bool = True
    """Never fuse the last FFN of a run: the paper found it sensitive."""
    max_channels: int | None = Field(default=None, ge=1)
    """Width of a fused FFN at most, channels: what fits one device."""
    max_dependency: float | None = Field(default=None, ge=0, le=2)
    """Largest cosine distance of an FFN's output with and without an earlier FFN of its group."""
    timing: Literal["decoder", "vllm"] | None = None
    """Where a decode step before and after fusion is timed, for the report; not at all by default."""


class LatencyFeedback(Config):
    """Measures children, corrects the block costs where their sum was wrong, and solves again."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"rounds": "max_rounds"}

    max_rounds: int = Field(default=0, ge=0)
    """Children that are assembled and measured at most; three are enough. Each takes a start of vLLM."""
    tolerance: float = Field(default=0.02, gt=0)
    """Relative difference of the predicted and the measured time at which they agree."""


class Candidates(Config):
    """Short distillation of several of the best choices, since ranking can change after distillation."""

    count: int = Field(default=1, ge=1)
    """Choices that are tried; 1 takes the best by score without a trial."""
    distance: int = Field(default=2, ge=1)
    """Sub-blocks in which any two of them differ at least."""
    num_steps: int = Field(default=40, gt=0)
    """Optimizer steps of each."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of the cosine schedule."""
    batches: int = Field(default=4, gt=0)
    """Batches of held-out text that decide."""


class Sharded(Config):
    """A share of the layers."""

    shard: str = Field(default="0/1", pattern=r"^\d+/[1-9]\d*$")
    """`i/n`: layers i, i + n, i + 2n, …"""

    @model_validator(mode="after")
    def _shard_exists(self) -> Self:
        index, count = self.shard_index
        if index >= count:
            raise ValueError(f"shard {self.shard} does not exist: counting begins at 0")
        return self

    @property
    def shard_index(self) -> tuple[int, int]:
        """This shard, and how many there are."""
        index, _, count = self.shard.partition("/")
        return int(index), int(count)


class ImportanceConfig(Calibration):
    """Channel importance."""

    importance_batches: int = Field(default=4, gt=0)
    """Batches of training text that channels are scored on."""


class CostsConfig(Space):
    """The cost of every sub-block."""

    measurement: Measurement = Measurement()
    """How latency is measured where no costs are given."""


class Trained(Space, Calibration):
    """How the block library is made."""

    distillation: Distillation = Distillation()
    """Training of the variants."""


class TaskSet(Config):
    """Problems that sub-blocks are scored on in addition to text: answered greedily, graded as in the evaluation."""

    num_problems: int = Field(default=0, ge=0)
    """Validation problems; 0 scores on text alone. A problem costs up to `max_tokens` forward passes a sub-block."""
    max_tokens: int = Field(default=128, gt=0)
    """Longest answer, tokens."""


class Scored(Space, Calibration):
    """How sub-blocks are scored."""

    score: Measure = "kl"
    """What is measured, and what the solver minimises the sum of: KL(parent || child), growth of the next-token loss,
    1 - cos of the last hidden states, share of tokens whose likeliest successor changes, or `accuracy`, share of the
    task set's problems that are lost, with `kl` beside it."""
    scoring_batches: int = Field(default=2, gt=0)
    """Batches of held-out text that replace-one-block scores are averaged over."""
    task: TaskSet = TaskSet()
    """A task set that accuracy is measured on."""

    @property
    def text_measure(self) -> TextMeasure:
        """What is measured on text."""
        return "kl" if self.score == "accuracy" else self.score

    @model_validator(mode="after")
    def _score_is_measured(self) -> Self:
        if self.score == "accuracy" and not self.task.num_problems:
            raise ValueError("score: accuracy needs a task set: set task.num_problems")
        return self


class LibraryConfig(Trained, Sharded):
    """The block library of a share of the layers."""


class ScoresConfig(Scored, Sharded):
    """The scores of a share of the layers."""


class SearchConfig(ImportanceConfig, CostsConfig, Trained, Scored):
    """The whole search; holds what the stages before it need, so that it can also do their work."""

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "truth": "latency_feedback",
        "allow_unserved": "allow_plugin_only_blocks",
    }

    limits: Limits = Limits(latency_ms="60%")
    """The budget of the child."""
    fusion: Fusion = Fusion()
    """FFN Fusion of the child and of the two baselines."""
    latency_feedback: LatencyFeedback = LatencyFeedback()
    """Whether children are measured."""
    candidates: Candidates = Candidates()
    """Whether several choices are distilled before one is taken."""
    pareto_points: int = Field(default=9, ge=2)
    """Latency limits of the Pareto front, from the least reachable to the parent's."""

    @model_validator(mode="after")
    def _truth_is_measured(self) -> Self:
        if self.latency_feedback.max_rounds and self.measurement.device is not None:
            raise ValueError(
                "latency_feedback.max_rounds measures children on this machine: leave measurement.device out, or this"
            )
        return self

    def part(self, kind: type[Settings], **more: str) -> Settings:
        """The settings of one of the upstream stages.

        Args:
            kind: its configuration class.
            more: what is no setting of the whole search: the `shard`.
        """
        shared = kind.model_fields.keys() & type(self).model_fields.keys()
        return kind(**{name: getattr(self, name) for name in shared}, **more)
