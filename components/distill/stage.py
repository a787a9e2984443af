"""Global knowledge distillation of a child from its parent."""

from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from components.core.batches import IGNORE, Batch, PackedStream, load_corpus
from components.core.checkpoint import load_model, save_model
from components.core.errors import InputError
from components.core.job import Job
from components.core.losses import cosine_sum, counted, kl_sum
from components.core.model import TesseraForCausalLM
from components.core.train import LossFunction, train, unsharded
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
    losses = train(child, stream, distillation_loss(parent, paired_layers(parent, child), config), config, job)
    whole = unsharded(child)
    if job.rank == 0:
        save_model(whole, out / "distilled", tokenizer=student)
    return {"loss": losses[-1], "num_steps": len(losses)}


def paired_layers(parent: TesseraForCausalLM, child: TesseraForCausalLM) -> list[tuple[int, int]]:
    """Pairs (parent, child) of hidden states that stand for the same depth; index 0 is the embedding's output.

    The search writes `parent_layers` into the child's configuration: for each child layer, how many parent layers
    are behind its output. Without it, equal depths pair one to one, and other depths pair only the last.
    """
    depth = child.config.num_hidden_layers
    behind = getattr(child.config, "parent_layers", None)
    if behind is None:
        same = depth == parent.config.num_hidden_layers
        behind = list(range(1, depth + 1)) if same else []
    pairs = [(int(above), layer) for layer, above in enumerate(behind, 1)]
    return [(p, c) for p, c in pairs if p < parent.config.num_hidden_layers and c < depth] + [(-1, -1)]


def distillation_loss(parent: TesseraForCausalLM, pairs: list[tuple[int, int]], config: DistillConfig) -> LossFunction:
    """The loss of one micro batch: mean over paired layers of the cosine distance, plus KL."""

    def loss(child: TesseraForCausalLM, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher = hidden_states(parent, batch)
        student = hidden_states(child, batch)
        student_ND, _ = counted(student[-1], batch.labels_BT)
        teacher_ND, _ = counted(teacher[-1], batch.labels_BT)
        kl = kl_sum(student_ND, teacher_ND, child.lm_head, parent.lm_head)
        mask_BT = batch.labels_BT != IGNORE
        cosines = [cosine_sum(student[c][mask_BT], teacher[p][mask_BT]) for p, c in pairs]
        cosine = torch.stack(cosines).sum()
        total = config.cosine_weight * cosine + config.kl_weight * kl
        return {"loss": total, "kl": kl, "cosine": cosine}

    return loss


def hidden_states(model: TesseraForCausalLM, batch: Batch) -> tuple[Tensor, ...]:
    """Hidden states (B, T, D): the embedding's output, then each layer's, the last after the final norm."""
    output = model.model(
        batch.input_ids_BT,
        position_ids=batch.position_ids_BT,
        segment_ids=batch.segment_ids_BT,
        output_hidden_states=True,
    )
    states: tuple[Tensor, ...] = output.hidden_states
    return states
