"""Global knowledge distillation of a child from its parent."""

from pathlib import Path

import torch
from pydantic import JsonValue

from components.core.batches import PackedStream, load_corpus
from components.core.checkpoint import load_model, save_model
from components.core.distillation import distillation_loss, paired_layers
from components.core.errors import InputError
from components.core.job import Job
from components.core.train import train, unsharded
from components.distill.config import DistillConfig


def run(
    config: DistillConfig, *, job: Job, out: Path, teacher: Path, student: Path, corpus: Path
) -> dict[str, JsonValue]:
    """Minimise cosine distance of hidden states plus KL of the distributions. Source: arXiv 2411.19146, section 4.3."""
    parent = load_model(teacher, dtype=None, computes_in=torch.float32).requires_grad_(False)
    child = load_model(student)
    if parent.config.vocab_size != child.config.vocab_size:
        raise InputError(
            f"teacher and student have different vocabularies ({parent.config.vocab_size}, {child.config.vocab_size})",
            hint="distil a child from the parent it was searched from",
        )
    stream = PackedStream(load_corpus(corpus, student, "train"), config.seq_len, config.seed or 0)
    if job.placement.gpus:
        torch.nn.Module.to(parent, "cuda")
    weights = {"cosine_weight": config.cosine_weight, "kl_weight": config.kl_weight}
    losses = train(child, stream, distillation_loss(parent, paired_layers(parent, child), **weights), config, job)
    whole = unsharded(child)
    if job.rank == 0:
        save_model(whole, out / "distilled", tokenizer=student)
    return {"loss": losses[-1], "num_steps": len(losses)}
