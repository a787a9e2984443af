"""The parent, and the text that it is watched on."""

from pathlib import Path

import torch

from components.core.batches import Batch, load_batches
from components.core.checkpoint import load_model
from components.core.job import Job
from components.core.model import TesseraForCausalLM
from components.search.config import Calibration


def load_parent(folder: Path, job: Job) -> TesseraForCausalLM:
    """The parent, frozen."""
    torch.set_num_threads(job.placement.threads)
    parent = load_model(folder)
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
