"""What the stages of the search write: `costs.json`, a shard's `library.json` and `scores.json`, `search.json`.

Light: no torch.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from components.core.architecture import Architecture
from components.core.config import Config
from components.core.errors import InputError
from components.search.config import Measure, Measurement
from components.search.proof import Certificate
from components.search.space import Part, Size
from components.search.table import Costs, OptionTable

COSTS_FILE = "costs.json"
LIBRARY_FILE = "library.json"
SCORES_FILE = "scores.json"
TABLE_FILE = "search.json"


class MeasuredModel(Config):
    """One of the models that were timed."""

    num_key_value_heads: tuple[Size, ...]
    """KV heads of each layer; 0 where there is no attention."""
    intermediate_size: tuple[Size, ...]
    """FFN channels of each layer; 0 where there is no FFN."""
    step_ms: tuple[float, ...]
    """Time of one decode step of the batch; some a round."""
    median_ms: float
    """Median over the rounds: what counts."""
    spread_ms: float
    """Difference of the slowest and the fastest."""
    explained_ms: float
    """What the costs of its sub-blocks and the fixed part add up to."""
    first_token_ms: tuple[float, ...] = ()
    """Time from the prompts of the batch to its first tokens; some a round."""
    median_first_token_ms: float = 0.0
    """Median of those."""
    explained_first_token_ms: float = 0.0
    """What the costs of its sub-blocks and the fixed part add up to."""


class Machine(Config):
    """Where the measurement was made."""

    device: str
    """Processor or accelerator."""
    threads: int
    """CPU threads of the engine."""
    versions: dict[str, str]
    """Versions of the libraries that decide speed."""


class Spread(Config):
    """How far apart the cost of a sub-block comes out when every measurement is explained by itself."""

    latency_ms: float
    """Of a decode step: the largest less the least, milliseconds."""
    time_to_first_token_ms: float
    """Of the prefill, likewise."""


class CostTable(Config):
    """`costs.json`: what every sub-block costs, and everything that was measured to know it."""

    fixed: Costs
    """Embeddings, final norm and head; the part of a step that no sub-block takes."""
    blocks: dict[str, Costs]
    """Costs by name of the variant, such as `attention-2` or `ffn-256`."""
    machine: Machine
    """Where latency was measured."""
    measurement: Measurement
    """How latency was measured."""
    models: tuple[MeasuredModel, ...]
    """What was measured."""
    spread: dict[str, Spread] = Field(default_factory=dict)
    """Spread of the measured costs by name of the variant; `fixed` is the fixed part."""


Start = Literal["parent", "earlier", "reused"]


class TrainedBlock(Config):
    """One sub-block of a library."""

    layer: int
    """Layer of the parent."""
    part: Part
    """Attention or FFN."""
    size: Size
    """KV heads or channels; 0 is the no-op, `linear` one matrix."""
    first_error: float | None = None
    """Normalised error of the untrained variant on the first batch; 1 is as good as nothing. None without training."""
    last_error: float | None = None
    """Mean normalised error over the last tenth of the training steps."""
    steps: int = 0
    """Steps that it was taught in."""
    start: Start = "parent"
    """What it was made from: the parent's own weights, an earlier library's, or those as they are, without training."""


class CoupledPair(Config):
    """An attention and an FFN that were trained together."""

    layer: int
    """Layer of the parent."""
    attention: str
    """Name of the variant."""
    ffn: str
    """Name of the variant."""
    first_error: float
    """Normalised error of what both add to the residual stream, at the first step; 1 is as good as nothing."""
    last_error: float
    """The same at the last step."""


class ShardLibrary(Config):
    """`library.json` of one shard."""

    blocks: tuple[TrainedBlock, ...]
    """Every sub-block of the shard's layers that has weights of its own."""
    num_layers: int = 0
    """Layers of the parent."""
    num_steps: int = 0
    """Steps of the distillation."""
    teachers: dict[str, str] = Field(default_factory=dict)
    """By layer and part, such as `3/ffn`, SHA-256 of the parent's own sub-block, which taught the variants."""


class BlockScore(TrainedBlock):
    """One alternative sub-block."""

    kl: float
    """KL(parent || parent with this one sub-block replaced), nats a token; at least this where it was dropped."""
    lm_loss: float | None = None
    """What the next-token loss grows by, nats a token; below 0 where it falls. None where it was not measured."""
    cosine: float | None = None
    """1 - cos of the last hidden states, mean over tokens."""
    top1: float | None = None
    """Share of tokens that become another one where the likeliest is taken."""
    accuracy: float | None = None
    """Share of the task set's problems that the parent solves, less the share that is solved with this sub-block."""
    errors: dict[Measure, float] = Field(default_factory=dict)
    """Standard error of each measure, rows of text and problems being what was sampled; none from a single one."""
    row_sums: dict[Measure, tuple[float, ...]] = Field(default_factory=dict)
    """Each measure summed over the tokens of each row, `accuracy` of each problem; left out of `search.json`."""
    dropped: bool = False
    """Whether scoring stopped early because no solver would choose it."""

    def of(self, measure: Measure) -> float:
        """One of the measures.

        Raises:
            InputError: it was not measured.
        """
        value: float | None = getattr(self, measure)
        if value is None:
            raise InputError(
                f"scores.json has no {measure} of layer {self.layer}'s {self.part}-{self.size}",
                hint="score again with search.task.num_problems"
                if measure == "accuracy"
                else "score again, or set search.score to kl",
            )
        return value


class ShardScores(Config):
    """`scores.json` of one shard."""

    tokens: int
    """Held-out tokens that the measures are averaged over."""
    row_tokens: tuple[int, ...] = ()
    """Those of each row."""
    parent_accuracy: float | None = None
    """Share of the task set's problems that the parent solves; None without a task set."""
    flops: int = 0
    """Floating-point operations of matrix products and attention that scoring took."""
    naive_flops: int = 0
    """What a forward pass of a whole model for each variant would have taken."""
    blocks: tuple[BlockScore, ...]
    """Every alternative sub-block of the shard's layers."""


class Margin(Config):
    """A slot of the best child against the best child that has another option there."""

    layer: int
    """Layer of the parent."""
    part: Part
    """Attention or FFN."""
    chosen: str
    """What the best child has."""
    following: str | None = None
    """What the next best has; None where nothing else is within the limits."""
    difference: float | None = None
    """What the next best scores more."""
    error: float | None = None
    """Standard error of that, from the rows of text that both were scored on; None where it is not known."""
    within_noise: bool | None = None
    """Whether the difference is less than two standard errors: other text could have turned the choice."""


class LayerShape(Config):
    """A layer of a child."""

    num_key_value_heads: Size
    """0 where there is no attention, `linear` where it is one matrix."""
    intermediate_size: Size
    """0 where there is no FFN, `linear` where it is one matrix."""
    parent_layers: tuple[int, ...]
    """The parent's layers that it stands for; several where FFNs were fused."""


class Picked(Config):
    """A choice of one option a slot."""

    choice: tuple[int, ...]
    """Number of the chosen option of each slot."""
    score: float
    """Sum of the replace-one-block scores, nats a token."""
    costs: Costs
    """Predicted, before fusion."""
    within_limits: bool
    """Whether the prediction meets the limits."""


class Chosen(Picked):
    """A choice, and the model it makes."""

    layers: tuple[LayerShape, ...]
    """One a layer of the parent, before fusion."""
    fused_layers: tuple[LayerShape, ...]
    """After empty layers were dropped and runs of FFNs fused: the layers of the model as written."""
    parameters: int
    """Of the model as written."""


class TruthRound(Config):
    """One child of the truth loop: what sums of block costs said, and what was measured."""

    choice: tuple[int, ...]
    """Number of the chosen option of each slot."""
    score: float
    """Sum of its scores."""
    predicted: dict[str, float]
    """Times by name, as the costs of that round add up, milliseconds."""
    measured: dict[str, float]
    """Times of the assembled child, at the pace of the costs: as if the parent took what it took then, milliseconds.

    A child that the last round measured already is not measured again.
    """
    pace: float
    """A decode step of the parent as measured beside the child, over what it took when costs were measured."""
    spread: float
    """Largest less least decode step of the child, as a share of their median."""
    error: float
    """Largest relative difference of predicted and measured times that are limited; of a decode step where none is."""
    agreed: bool
    """Whether that is within the tolerance."""


class CandidateTrial(Config):
    """One of the best choices by score, after a short distillation."""

    choice: tuple[int, ...]
    """Number of the chosen option of each slot."""
    score: float
    """Sum of the replace-one-block scores, nats a token."""
    kl_before: float
    """Held-out KL(parent || child) before the distillation, nats a token."""
    kl_after: float
    """The same after it."""
    difference: float
    """That less the first candidate's, nats a token."""
    difference_error: float
    """Standard error of the difference over held-out rows, nats a token."""
    chosen: bool
    """Whether the child is this one."""


class FfnRun(Config):
    """Consecutive FFNs of the child without attention between them."""

    layers: tuple[int, ...]
    """The parent's layers that they are of."""
    dependency: tuple[tuple[float, ...], ...]
    """Of each row's FFN, how much each column's depends on it: the cosine distance of what the latter adds with and
    without the former; 0 where it comes before."""
    groups: tuple[tuple[int, ...], ...]
    """Which of them became one layer each."""


class FusionEffect(Config):
    """What fusion did to the child, both without any training since the library."""

    runs: tuple[FfnRun, ...]
    """All runs of two or more FFNs."""
    tokens: int
    """Held-out tokens that KL is averaged over."""
    kl_before: float
    """KL(parent || child) without fusion, nats a token."""
    kl_after: float
    """The same of the child as written."""
    kl_error: float
    """Standard error of their difference over held-out rows, nats a token."""
    timing: Literal["decoder", "vllm"] | None = None
    """Where a decode step was timed."""
    before_ms: tuple[float, ...] = ()
    """Decode steps of the measured batch without fusion, milliseconds, in turn with those after it."""
    after_ms: tuple[float, ...] = ()
    """The same of the child as written."""


class Proof(Config):
    """What the solver says of its answer."""

    objective: float
    """Score of the child."""
    bound: float
    """No choice within the limits scores below this."""
    gap: float
    """Relative distance of the two."""
    status: str
    """`optimal`, or `feasible` where the gap is not 0."""


class ParetoPoint(Config):
    """The best choice at one latency limit, other limits as they are."""

    limit_ms: float
    """Latency limit."""
    choice: tuple[int, ...]
    """Number of the chosen option of each slot."""
    score: float
    """Sum of its scores."""
    costs: Costs
    """Predicted, before fusion."""


class FrontPoint(Config):
    """The best choice at one limit of some resource, other limits as they are."""

    limit: float
    """Of the resource."""
    choice: tuple[int, ...]
    """Number of the chosen option of each slot."""
    score: float
    """Sum of its scores."""
    costs: Costs
    """Predicted, before fusion."""


class LayerImportance(Config):
    """How FFN contribution spreads over the channels of a layer."""

    layer: int
    """Layer of the parent."""
    mean: float
    """Mean contribution of a channel."""
    top_half_share: float
    """Share of all contribution that the more important half of the channels holds; 0.5 where all are alike."""


class SearchTable(OptionTable):
    """`search.json`: everything a report needs, and what `solve_table` solves again under other limits."""

    limits: dict[str, float]
    """The limits that were set, absolute."""
    parent: Costs
    """Predicted cost of the parent."""
    child: Chosen
    """The best choice."""
    proof: Proof
    """Evidence that it is the best."""
    margins: tuple[Margin, ...] = ()
    """How far each slot is from another choice, and how well that is known."""
    certificate: Certificate | None = None
    """The evidence in full, which `tessera search check` verifies from the options alone."""
    random_child: Chosen
    """A random choice at the same limits."""
    greedy_child: Chosen
    """A greedy choice at the same limits."""
    baselines: dict[str, Picked] = Field(default_factory=dict)
    """Other choices at the same limits, of which no model is made: `most parameters`, and `uniform` where one fits."""
    fusion: FusionEffect | None = None
    """Dependency of the child's FFNs on each other, and what fusing them did."""
    candidates: tuple[CandidateTrial, ...] = ()
    """The best choices by score, the first of them proven; empty where only that one was considered."""
    pareto: tuple[ParetoPoint, ...]
    """Best score over latency."""
    fronts: dict[str, tuple[FrontPoint, ...]] = Field(default_factory=dict)
    """Best score over other resources, by their names."""
    importance: tuple[LayerImportance, ...]
    """Channel importance of each layer with an FFN."""
    architecture: Architecture | None = None
    """Shape of the parent."""
    measurement: Measurement | None = None
    """The deployment that costs are of."""
    truth: tuple[TruthRound, ...] = ()
    """Rounds of the truth loop; costs are as corrected by them."""
    blocks: tuple[BlockScore, ...]
    """Scores and training errors of all alternative sub-blocks."""
    coupled: tuple[CoupledPair, ...] = ()
    """Pairs of the child that were trained together."""
    machine: Machine
    """Where latency was measured."""

    @property
    def best_choice(self) -> tuple[int, ...]:
        """The choice that is proven to have the best score; the child may be another candidate."""
        return self.candidates[0].choice if self.candidates else self.child.choice


def write_record(path: Path, record: Config) -> None:
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json(indent=1), encoding="utf-8")
