"""The training loop of pretraining, distillation and fine-tuning, and the optimizer step that RL shares with them.

Data is a stream addressed by the global count of samples (packed rows), so a run can stop anywhere and resume with
another number of processes. FSDP2 shards the model where there is more than one.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from components.core.model.accelerators import peak_flops
from components.core.model.architecture import Architecture
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.devices import device_name, device_of, memory_bytes, mesh_of
from components.core.runtime.placement import Placement
from components.core.text.packing import IGNORE, Batch, RowStream
from components.core.training.adamw_8bit import AdamW8bit
from components.core.training.checkpoints import load_point, save_point
from components.core.training.losses import BatchT, LossFunction
from components.core.training.sharding import is_sharded, shard
from components.core.training.step_memory import reduces_once
from components.core.training.train_config import Optimizer, TrainConfig, compute_dtype, learning_rate
from components.core.training.utilization import ModelFlops, StepMeter

MAX_GRAD_NORM = 1.0
"""Gradients are scaled down to this global norm. Source: arXiv 2307.09288, section 2.2."""

COMPILED_RUN_FLOPS = 1e14
"""Work from which on a run on a CPU is compiled: it saves an eighth of the time, and compiling takes 5 to 15 s a shape
of layer."""
ADAM_BETAS = (0.9, 0.95)
"""Decay of AdamW's two moments. Source: arXiv 2307.09288, section 2.2."""


class Objective(nn.Module, Generic[BatchT]):
    """Model and loss as one module; the weights of a sharded model are gathered while the loss is computed."""

    def __init__(self, model: TesseraForCausalLM, loss_function: LossFunction[BatchT]) -> None:
        super().__init__()
        self.model = model
        self._loss_function = loss_function

    def forward(self, batch: BatchT) -> dict[str, Tensor]:
        """The loss of one micro batch."""
        return self.model.forward_with(self._loss_function, batch)


@dataclass(frozen=True)
class OptimizerStep(Generic[BatchT]):
    """Takes optimizer steps: sums the gradients of micro batches, clips them and applies them.

    Attributes:
        objective: model and loss.
        optimizer: of the model's parameters.
        device: that computes; offloaded parameters are on the CPU.
        compute_dtype: type of matrix products; weights and optimizer state stay float32.
        num_ranks: processes that take this step together.
        reduces_once: whether gradients are added up over the ranks once a step, after the last micro batch. Until then
            a rank has the gradients of the whole model, four bytes a parameter.
    """

    objective: Objective[BatchT]
    optimizer: torch.optim.Optimizer
    device: torch.device
    compute_dtype: torch.dtype = torch.float32
    num_ranks: int = 1
    reduces_once: bool = False

    def precision(self) -> torch.autocast:
        """A context in which matrix products have the type of this step."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def run(self, micro_batches: Iterable[BatchT], num_targets: int, learning_rate: float) -> dict[str, float]:
        """Step on the mean over the counted positions of all ranks.

        FSDP averages gradients over ranks, so each rank's sum is multiplied by the number of ranks: the step does not
        depend on that number.

        Args:
            micro_batches: micro batches of this rank.
            num_targets: counted positions of all ranks.
            learning_rate: learning rate of this step.

        Returns:
            Mean of each term of the loss, and `grad_norm`: the norm of the gradient before clipping.
        """
        device = self.device
        sums: dict[str, Tensor] = {}
        for batch, is_last in _with_last(micro_batches):
            if isinstance(self.objective.model, FSDPModule):
                self.objective.model.set_requires_gradient_sync(is_last or not self.reduces_once)
            with self.precision():
                terms: dict[str, Tensor] = self.objective(batch)
            (terms["loss"] * (self.num_ranks / num_targets)).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float()
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), MAX_GRAD_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        means = torch.stack(list(sums.values())) / num_targets
        if self.num_ranks > 1:
            dist.all_reduce(means)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        values = torch.cat([means, norm.float().to(device)[None]]).tolist()  # one transfer from the device
        return dict(zip([*sums, "grad_norm"], values, strict=True))


def train(
    model: TesseraForCausalLM,
    stream: RowStream,
    loss_function: LossFunction[Batch],
    config: TrainConfig,
    context: StageContext,
    stored: str = "float32",
) -> list[float]:
    """Train `model` in place.

    Args:
        model: float32; one that is whole is sharded in place where there is more than one process.
        stream: packed rows.
        loss_function: sums a loss over one micro batch.
        config: optimizer, schedule, batch.
        context: receives progress and resume points; says when to stop.
        stored: precision of the incoming model, which decides the type of matrix products if `config` does not.

    Returns:
        Loss of each step, nats a counted token; after a resume, the steps before it are included.

    Raises:
        Interrupted: the stage was asked to stop; a checkpoint was saved.
    """
    torch.manual_seed(config.seed or 0)
    torch.set_num_threads(context.placement.threads)
    device = device_of(context.placement)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    products = compute_dtype(config.dtype, stored)
    optimizer_step = prepare(model, loss_function, config.model_copy(update={"dtype": products}), context.placement)
    optimizer = optimizer_step.optimizer
    resumed = load_point(context, model, optimizer)
    losses: list[float] = resumed[1]["losses"] if resumed else []
    context.resume.interval_s = config.resume_interval_s
    peak = peak_flops(device_name(device), products)
    meter = StepMeter(
        ModelFlops.of(Architecture.from_config(model.config.to_dict())), None if peak is None else ranks * peak
    )
    while len(losses) < config.num_steps:
        step = len(losses)
        rate = learning_rate(config, step)
        size = config.global_batch_size
        with meter.waiting():
            batch = rank_batch(stream, step * size, size, context.rank, ranks)
        num_targets, num_tokens, num_pairs = _sum_over_ranks(
            [batch.num_targets, batch.num_tokens, batch.num_pairs], ranks, device
        )
        metrics = optimizer_step.run(
            _micro_batches(batch, config.micro_batch_size, device), num_targets, learning_rate=rate
        )
        losses.append(metrics["loss"])
        speeds = meter.end_step(num_tokens, num_targets, num_pairs)
        context.progress(step + 1, config.num_steps, "", **metrics, learning_rate=rate, **speeds)
        stopping, due = _agree(context.stopping(), context.resume.due(), ranks, device)
        if stopping or (due and step + 1 < config.num_steps):
            save_point(context, step + 1, model, optimizer, {"losses": losses})
        if stopping and step + 1 < config.num_steps:
            raise Interrupted
    if ranks > 1:
        context.resume.wait()  # its collective operations end before others begin to end
    context.resume.memory.clear()
    model.train(False)
    return losses


def prepare(
    model: TesseraForCausalLM,
    loss_function: LossFunction[Batch],
    config: TrainConfig,
    placement: Placement,
) -> OptimizerStep[Batch]:
    """Model on its device, or sharded over the ranks, its layers compiled where that pays, and with an optimizer."""
    device = device_of(placement)
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    products: torch.dtype = getattr(torch, config.dtype or "float32")
    if not isinstance(model, FSDPModule) and not placement.offload:
        model.to(device)
    model.train()
    if config.activation_checkpointing:
        model.model.activation_checkpointing = True
    objective = Objective(model, loss_function)
    if pays_to_compile(model, config, device, num_ranks) if config.compile is None else config.compile:
        for layer in model.model.layers:  # one at a time: layers of one shape share the compiled code
            layer.compile()
    if is_sharded(placement) and not isinstance(model, FSDPModule):
        shard(model, mesh_of(device), products, offload=placement.offload)
    optimizer = adamw(model, config.learning_rate, weight_decay=config.weight_decay, optimizer=config.optimizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    once = num_ranks > 1 and reduces_once(parameters, memory_bytes(device, placement), num_ranks)
    return OptimizerStep(objective, optimizer, device, products, num_ranks, once)


def pays_to_compile(model: TesseraForCausalLM, config: TrainConfig, device: torch.device, num_ranks: int = 1) -> bool:
    """Whether compiled layers save more time in this run than compiling takes.

    Never on GPUs or with several ranks, where it was not measured.
    """
    tokens = config.num_steps * config.global_batch_size * config.seq_len
    flops = 6 * sum(parameter.numel() for parameter in model.parameters()) * tokens
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    return device.type == "cpu" and num_ranks == 1 and has_compiler and flops >= COMPILED_RUN_FLOPS


def adamw(
    model: nn.Module, learning_rate: float, *, weight_decay: float = 0.0, optimizer: Optimizer = "adamw"
) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only; norms and biases have none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer == "adamw_8bit":
        return AdamW8bit(groups, learning_rate, ADAM_BETAS)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=ADAM_BETAS, fused=True)


def rank_batch(stream: RowStream, first: int, num_rows: int, rank: int, num_ranks: int) -> Batch:
    """Every `num_ranks`-th of the rows from `first` on, for each rank as many; only these rows are read.

    Collective operations hang if a rank takes a micro batch more. Where the rows do not divide, the last ranks get the
    first row as padding, without targets, so that it adds nothing to loss or gradient.
    """
    own = list(range(first + rank, first + num_rows, num_ranks))
    if len(own) * num_ranks >= num_rows:
        return stream.rows(own)
    batch = stream.rows([*own, first])
    batch.labels_BT[-1], batch.segment_ids_BT[-1] = IGNORE, 0
    return batch


def _with_last(batches: Iterable[BatchT]) -> Iterator[tuple[BatchT, bool]]:
    """Each batch, and whether it is the last one."""
    iterator = iter(batches)
    for batch in iterator:
        for following in iterator:
            yield batch, False
            batch = following
        yield batch, True


def _micro_batches(batch: Batch, size: int, device: torch.device) -> Iterator[Batch]:
    """Rows of a batch, `size` at a time, on the device."""
    for start in range(0, batch.input_ids_BT.shape[0], size):
        yield batch.rows(start, start + size).to(device)


def _sum_over_ranks(counts: list[int], ranks: int, device: torch.device) -> list[int]:
    """The sum of each count over the ranks."""
    if ranks == 1:
        return counts
    values = torch.tensor(counts, device=device)
    dist.all_reduce(values)
    return [int(value) for value in values.tolist()]


def _agree(stopping: bool, due: bool, ranks: int, device: torch.device) -> tuple[bool, bool]:
    """What all ranks do alike: they stop when one of them is asked to, and save when each of them is due."""
    if ranks == 1:
        return stopping, due
    votes = torch.tensor([stopping, not due], dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    one_stops, one_is_not_due = votes.tolist()
    return bool(one_stops), not one_is_not_due
