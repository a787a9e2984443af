"""The one training loop: pretrain, distil and fine-tune on one process or on many.

Data is a stream addressed by the global count of samples (packed rows), so a run can stop anywhere and go on with
another number of processes. FSDP2 shards the model where there is more than one.
"""

import time
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from components.core.model.decoder import TesseraConfig, TesseraForCausalLM
from components.core.runtime.context import Interrupted, StageContext
from components.core.text.packing import Batch, PackedStream
from components.core.training.checkpoints import load_point, save_point
from components.core.training.train_config import TrainConfig, learning_rate

OWN_GROUP_PARAMETERS = 1 << 20
"""Parameters from which on a decoder layer is gathered by itself."""

LossFunction = Callable[[TesseraForCausalLM, Batch], dict[str, Tensor]]
"""Sums over the counted positions of one micro batch: `loss`, with gradient, and the terms that the curves show."""


class Objective(nn.Module):
    """Model and loss as one module, so that sharded parameters are gathered around the whole of it."""

    def __init__(self, model: TesseraForCausalLM, loss_function: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._loss_function = loss_function

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of one micro batch."""
        return self._loss_function(self.model, batch)


def train(
    model: TesseraForCausalLM,
    stream: PackedStream,
    loss_function: LossFunction,
    config: TrainConfig,
    context: StageContext,
) -> list[float]:
    """Train `model` in place.

    Args:
        model: float32; sharded in place where there is more than one process.
        stream: packed rows.
        loss_function: sums a loss over one micro batch.
        config: optimizer, schedule, batch.
        context: takes progress, keeps resume points, says when to stop.

    Returns:
        Loss of each step since the start, nats a counted token, resumed steps included.

    Raises:
        Interrupted: the stage was asked to stop; a checkpoint was saved.
    """
    torch.manual_seed(config.seed or 0)
    torch.set_num_threads(context.placement.threads)
    device = torch.device("cuda") if context.placement.gpus else torch.device("cpu")
    nn.Module.to(model, device).train()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    objective = Objective(model, loss_function)
    if ranks > 1:
        shard(objective)
    if config.compile:
        model.model.compile()
    betas = (config.beta1, config.beta2)
    optimizer = adamw(model, config.learning_rate, weight_decay=config.weight_decay, betas=betas)
    found = load_point(context, model, optimizer)
    losses: list[float] = found[1]["losses"] if found else []
    context.resume.interval_s = config.resume_interval_s
    started, tokens = time.monotonic(), 0
    while len(losses) < config.num_steps:
        step = len(losses)
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = stream.batch(step * config.global_batch_size, config.global_batch_size)
        parts, grad_norm = _step(objective, optimizer, batch, config, context.rank, ranks, device)
        losses.append(parts["loss"])
        tokens += int((batch.segment_ids_BT > 0).sum())
        per_s = tokens / (time.monotonic() - started)
        context.progress(
            step + 1, config.num_steps, "", **parts, grad_norm=grad_norm, learning_rate=rate, tokens_per_s=per_s
        )
        stopping = _any_rank(context.stopping(), ranks, device)
        if stopping or (_any_rank(context.resume.due(), ranks, device) and step + 1 < config.num_steps):
            save_point(context, step + 1, model, optimizer, {"losses": losses})
        if stopping and step + 1 < config.num_steps:
            raise Interrupted
    model.train(False)
    return losses


def adamw(
    model: nn.Module, learning_rate: float, *, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW that decays matrices alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def shard(objective: Objective) -> None:
    """Shard parameters, gradients and optimizer state over all processes with FSDP2.

    Large decoder layers are gathered one at a time; small ones go with the whole, since a collective costs more than
    it saves.
    """
    for layer in objective.model.model.layers:
        if sum(parameter.numel() for parameter in layer.parameters()) >= OWN_GROUP_PARAMETERS:
            fully_shard(layer)
    fully_shard(objective)


def unsharded(model: TesseraForCausalLM) -> TesseraForCausalLM:
    """The whole model on every rank's CPU; the model itself where nothing is sharded."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = TesseraForCausalLM(cast("TesseraConfig", model.config))
    if dist.get_rank() == 0:
        whole.load_state_dict(state)
    whole.train(False)
    return whole


def _step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    rank: int,
    ranks: int,
    device: torch.device,
) -> tuple[dict[str, float], float]:
    """One optimizer step on a global batch; the mean is over the counted positions of all ranks.

    FSDP averages gradients over ranks, so each rank's sum is scaled by the number of ranks: the step does not depend
    on it.
    """
    targets = batch.num_targets
    mine = batch.rows(rank, config.global_batch_size, ranks)
    sums: dict[str, Tensor] = {}
    for start in range(0, mine.input_ids_BT.shape[0], config.micro_batch_size):
        part = mine.rows(start, start + config.micro_batch_size).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            terms = objective(part)
        (terms["loss"] * (ranks / targets)).backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float()
    norm = nn.utils.clip_grad_norm_(objective.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    stacked = torch.stack(list(sums.values()))
    if ranks > 1:
        dist.all_reduce(stacked)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return dict(zip(sums, (stacked / targets).tolist(), strict=True)), float(norm)


def _any_rank(flag: bool, ranks: int, device: torch.device) -> bool:
    """Whether the flag is set on any rank, so that all ranks act alike."""
    if ranks == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)
