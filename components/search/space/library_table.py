"""`library.json`: the trained sub-blocks of one shard, and records in JSON. Light: no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from components.core.base.config import Config
from components.search.space.layer_space import Part, Size

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
    """Optimizer steps of its training."""
    start: Start = "parent"
    """Start of its training: `parent` or `earlier` weights; `reused` is an earlier library's block without training."""


def write_record(path: Path, record: Config) -> None:
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json(indent=1), encoding="utf-8")


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
    """By layer and part, such as `3/ffn`, SHA-256 of the parent's own sub-block, the teacher of the variants."""


class LayerImportance(Config):
    """How FFN contribution spreads over the channels of a layer."""

    layer: int
    """Layer of the parent."""
    mean: float
    """Mean contribution of a channel."""
    top_half_share: float
    """Share of all contribution that the more important half of the channels holds; 0.5 where all are alike."""
