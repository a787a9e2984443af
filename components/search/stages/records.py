"""`search.json`: the result of the search. Light: no torch."""

from pydantic import Field

from components.core.model.architecture import Architecture
from components.search.child.records import ChildRecord, ChoiceRecord, FusionEffect
from components.search.config import Measurement
from components.search.costs.records import Machine
from components.search.costs.resources import Costs
from components.search.library.records import LayerImportance
from components.search.refine.records import CandidateTrial, FeedbackRound
from components.search.scoring.records import BlockScore
from components.search.solver.certificate import Certificate
from components.search.solver.option_table import OptionTable
from components.search.solver.records import FrontPoint, Margin, ParetoPoint, Proof

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
