"""Perplexity of every model on text that none of them was trained on: the validation split of the corpus."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.devices import device_of, free_memory
from components.core.text.packing import load_batches
from components.core.training.frozen_model import load_frozen
from components.core.training.losses import next_token_loss
from components.eval.answers import EvalCheckpoint
from components.eval.config import HeldOutText
from components.eval.replicas import Replicas

WHAT = "held-out text"


def measure_losses(
    models: Mapping[str, Path],
    corpus: Path,
    config: HeldOutText,
    context: StageContext,
    checkpoint: EvalCheckpoint,
    replicas: Replicas,
) -> None:
    """Measure the held-out loss of each model that has none in the checkpoint, and save it there.

    Each replica measures a model of its own at a time.

    Raises:
        DataError: the corpus has no validation text.
        Interrupted: the stage was asked to stop; the losses of finished models are in the checkpoint.
    """
    remaining = [role for role in models if role not in checkpoint.losses]
    for begin in range(0, len(remaining), replicas.count):
        together = remaining[begin : begin + replicas.count]
        losses = {
            role: held_out_loss(role, models[role], corpus, config, context, replicas.count)
            for role in replicas.share(together)
        }
        for measured in replicas.exchange(losses):
            checkpoint.losses |= measured
        if replicas.is_first:
            checkpoint.save(context.resume)


@torch.no_grad()
def held_out_loss(
    role: str, folder: Path, corpus: Path, config: HeldOutText, context: StageContext, replicas: int = 1
) -> float:
    """Mean cross-entropy of a model, nats a token, in float32; a large model is read a layer at a time for each batch.

    Args:
        role: the model's, for progress.
        folder: the model's, with its tokenizer.
        corpus: a folder with `validation.jsonl`.
        config: how much text, in rows of which length.
        context: takes progress, and tells when the stage must stop.
        replicas: that measure a model each at the same time.
    """
    batches = load_batches(
        corpus,
        folder,
        "validation",
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        limit=config.num_batches,
        seed=config.seed,
    )
    model = load_frozen(folder, context, what=f"the model {role}", computes_in=torch.float32, processes=replicas)
    device = device_of(context.placement)
    loss, tokens = 0.0, 0
    for done, batch in enumerate(batches, 1):
        if context.stopping():
            raise Interrupted
        loss += float(next_token_loss(model, batch.to(device))["loss"])
        tokens += batch.num_targets
        complete = {"perplexity": perplexity(loss / tokens)} if done == len(batches) else {}
        context.progress(done, len(batches), f"{WHAT} of {role}", **complete)
    del model
    free_memory(device)  # for the servers that follow
    return loss / tokens


def perplexity(loss: float) -> float:
    """Perplexity of a loss in nats a token."""
    return math.exp(loss)
