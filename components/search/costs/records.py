"""`costs.json`: what every sub-block costs, and how that was measured. Light: no torch."""

from pydantic import Field

from components.core.base.config import Config
from components.search.config import Measurement
from components.search.costs.resources import Costs
from components.search.space.layer_space import Size

COSTS_FILE = "costs.json"


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
