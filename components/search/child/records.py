"""Records of children and of FFN Fusion in `search.json`. Light: no torch."""

from typing import Literal

from components.core.base.config import Config
from components.search.costs.resources import Costs
from components.search.space.layer_space import Size


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
