"""`library.json` of one shard. Light: no torch."""

from pydantic import Field

from components.core.base.config import Config
from components.search.space.records import TrainedBlock

LIBRARY_FILE = "library.json"


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


class LayerImportance(Config):
    """How FFN contribution spreads over the channels of a layer."""

    layer: int
    """Layer of the parent."""
    mean: float
    """Mean contribution of a channel."""
    top_half_share: float
    """Share of all contribution that the more important half of the channels holds; 0.5 where all are alike."""
