"""What `search.json` says of the rounds after the first solution. Light: no torch."""

from components.core.base.config import Config


class FeedbackRound(Config):
    """One child of the latency feedback: what sums of block costs said, and what was measured."""

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
