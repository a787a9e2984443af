"""The parent, and the text of calibration and held-out measurements."""

from pathlib import Path

import torch

from components.core.model.checkpoint import load_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.inspection import weight_files
from components.core.runtime.context import StageContext
from components.core.text.packing import Batch, load_batches
from components.search.config import Calibration

PAGED_SHARE = 0.5
"""Share of a stage's memory that the parent may take; the layers of a larger one are read one at a time."""


def load_parent(folder: Path, context: StageContext, dtype: str = "float32") -> TesseraForCausalLM:
    """Load the parent, frozen: weights in the precision of its files, computation in `dtype`.

    It is paged if it would take too much of the stage's memory.
    """
    torch.set_num_threads(context.placement.threads)
    needed_gib = sum(file.stat().st_size for file in weight_files(folder)) / 2**30
    paged = needed_gib > PAGED_SHARE * context.placement.memory_gib
    if paged:
        context.note(
            f"the parent takes {needed_gib:.3g} GiB and memory_gib={context.placement.memory_gib:g}: "
            "its layers are read one at a time"
        )
    parent = load_model(folder, dtype=None, computes_in=getattr(torch, dtype), paged=paged)
    parent.requires_grad_(False)
    return parent


def calibration_batches(config: Calibration, corpus: Path, parent: Path, split: str, limit: int) -> list[Batch]:
    """Packed batches of one split of the corpus."""
    return load_batches(
        corpus,
        parent,
        split,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        limit=limit,
        seed=config.seed or 0,
    )
