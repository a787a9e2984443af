"""What `search.json` says of the solution. Light: no torch."""

from components.core.base.config import Config
from components.search.costs.resources import Costs
from components.search.space.layer_space import Part


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
