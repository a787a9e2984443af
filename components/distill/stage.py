"""Global knowledge distillation of a child from its parent."""

from pathlib import Path

import torch
from pydantic import JsonValue

from components.core.base.errors import InputError
from components.core.model.inspection import stored_dtype
from components.core.runtime.context import StageContext
from components.core.text.packing import corpus_stream
from components.core.training.loop import train
from components.core.training.losses import distillation_loss, paired_layers
from components.core.training.sharding import load_student, load_teacher, save_trained
from components.distill.config import DistillConfig


def run(
    config: DistillConfig, *, context: StageContext, out: Path, teacher: Path, student: Path, corpus: Path
) -> dict[str, JsonValue]:
    """Minimise the KL of the distributions plus the distance of the states. Source: arXiv 2411.19146, section 4.3."""
    parent, child = load_teacher(teacher, context), load_student(student, config, context)
    if parent.config.vocab_size != child.config.vocab_size:
        raise InputError(
            f"teacher and student have different vocabularies ({parent.config.vocab_size}, {child.config.vocab_size})",
            hint="distil a child from the parent it was searched from",
        )
    rows = context.scratch / "rows"
    stream = corpus_stream(corpus, student, "train", seq_len=config.seq_len, seed=config.seed or 0, folder=rows)
    stored = stored_dtype(student)
    pairs = paired_layers(parent, child)
    loss = distillation_loss(parent, pairs, config.hidden_state_loss, config.top_k_logits)
    losses = train(child, stream, loss, config, context, stored)
    save_trained(child, out / "distilled", tokenizer=student, dtype=getattr(torch, stored))
    return {"loss": losses[-1], "num_steps": len(losses)}
