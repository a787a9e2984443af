"""`search.json`: the result of the search. Light: no torch."""

from typing import Literal

from pydantic import Field

from components.core.base.config import Config
from components.core.model.architecture import Architecture
from components.search.config import Measurement
from components.search.costs.resources import Costs, Machine
from components.search.scoring.score_table import BlockScore
from components.search.solver.certificate import Certificate
from components.search.solver.explain import Margin
from components.search.solver.fronts import FrontPoint, ParetoPoint
from components.search.solver.option_table import OptionTable
from components.search.space.layer_space import Size
from components.search.space.library_table import LayerImportance


class LayerShape(Config):
    """A layer of a child."""

    num_key_value_heads: Size
    """0 where there is no attention, `linear` where it is one matrix."""
    intermediate_size: Size
    """0 where there is no FFN, `linear` where it is one matrix."""
    parent_layers: tuple[int, ...]
    """The parent's layers that it replaces; several where FFNs were fused."""


class ChoiceRecord(Config):
    """A choice of one option a slot."""

    choice: tuple[int, ...]
    """Number of the chosen option of each slot."""
    score: float
    """Sum of the replace-one-block scores, nats a token."""
    costs: Costs
    """Predicted, before fusion."""
    within_limits: bool
    """Whether the prediction meets the limits."""


class ChildRecord(ChoiceRecord):
    """A choice that was made into a model."""

    layers: tuple[LayerShape, ...]
    """One a layer of the parent, before fusion."""
    fused_layers: tuple[LayerShape, ...]
    """After empty layers were dropped and runs of FFNs fused: the layers of the model as written."""
    parameters: int
    """Of the model as written."""


class FfnRun(Config):
    """Consecutive FFNs of the child without attention between them."""

    layers: tuple[int, ...]
    """The parent's layers that they are of."""
    dependency: tuple[tuple[float, ...], ...]
    """Dependency of each column's FFN on each row's: cosine distance of the column's output with and without the row's
    FFN; 0 where the column comes first."""
    groups: tuple[tuple[int, ...], ...]
    """Which of them became one layer each."""


class FusionEffect(Config):
    """Effect of fusion on the child; neither model was trained since the library."""

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


class FeedbackRound(Config):
    """One child of the latency feedback: what sums of block costs said, and what was measured."""

    choice: tuple[int, ...]
    """Number of the chosen option of each slot."""
    score: float
    """Sum of its scores."""
    predicted: dict[str, float]
    """Times by name, as the costs of that round add up, milliseconds."""
    measured: dict[str, float]
    """Times of the assembled child, milliseconds, corrected for the parent's drift since the costs were measured.

    A child that the last round measured already is not measured again.
    """
    pace: float
    """Decode step of the parent, measured in turns with the child, over its decode step when costs were measured."""
    spread: float
    """Largest less least decode step of the child, as a share of their median."""
    error: float
    """Largest relative difference of predicted and measured times that are limited; of a decode step where none is."""
    agreed: bool
    """Whether the error is within the tolerance."""


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
    """`kl_after` less the first candidate's, nats a token."""
    difference_error: float
    """Standard error of the difference over held-out rows, nats a token."""
    chosen: bool
    """Whether the child is made from this candidate."""


class Proof(Config):
    """Proof of optimality of the solution."""

    objective: float
    """Score of the child."""
    bound: float
    """No choice within the limits scores below this."""
    gap: float
    """Relative distance of objective and bound."""
    status: str
    """`optimal`, or `feasible` where the gap is not 0."""


TABLE_FILE = "search.json"


class SearchTable(OptionTable):
    """`search.json`: everything a report needs, and what `solve_table` solves again under other limits."""

    limits: dict[str, float]
    """The limits that were set, absolute."""
    parent: Costs
    """Predicted cost of the parent."""
    child: ChildRecord
    """The best choice."""
    proof: Proof
    """Evidence that it is the best."""
    margins: tuple[Margin, ...] = ()
    """How far each slot is from another choice, and how well that is known."""
    certificate: Certificate | None = None
    """The evidence in full, which `tessera search check` verifies from the options alone."""
    random_child: ChildRecord
    """A random choice at the same limits."""
    greedy_child: ChildRecord
    """A greedy choice at the same limits."""
    baselines: dict[str, ChoiceRecord] = Field(default_factory=dict)
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
    latency_feedback: tuple[FeedbackRound, ...] = ()
    """Rounds of the latency feedback; costs are as corrected by them."""
    blocks: tuple[BlockScore, ...]
    """Scores and training errors of all alternative sub-blocks."""
    machine: Machine
    """Where latency was measured."""

    @property
    def best_choice(self) -> tuple[int, ...]:
        """The choice that is proven to have the best score; the child may be another candidate."""
        return self.candidates[0].choice if self.candidates else self.child.choice
