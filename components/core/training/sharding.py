"""Models of which each rank has a part: built on the meta device, sharded, filled from safetensors, and written again.

A single process has the whole model, and the same functions read and write it as it is.

No rank ever holds a whole model. Each parameter is cut by rows (its first dimension) into a part for each rank, as
FSDP2 does it: all parts have equally many rows, the last ones fewer or none.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from components.core.model import stored_weights
from components.core.model.checkpoint import compute_rotary, load_model, model_on_meta, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.inspection import stored_dtype
from components.core.model.stored_weights import StoredWeights
from components.core.model.vocabulary import NewRows, NewTokens, grow_on_meta, grow_vocabulary
from components.core.model.weight_index import EMBEDDING, HEAD
from components.core.runtime.context import StageContext
from components.core.runtime.devices import device_of, mesh_of
from components.core.runtime.placement import Placement
from components.core.training import step_memory
from components.core.training.train_config import TrainConfig, compute_dtype

REDUCED_VALUES = 1 << 20
"""Gradients that ranks on CPUs add up at once: 4 MiB."""


def load_student(
    folder: Path, config: TrainConfig, context: StageContext, tokens: NewTokens | None = None
) -> TesseraForCausalLM:
    """A model to train, in float32: whole and on the CPU in a single process, else this rank's part where it is kept.

    Args:
        folder: a model folder.
        config: says in which type matrix products are computed.
        context: has the placement.
        tokens: tokens that the model is given rows for.

    Raises:
        CheckpointError: see `load_model`.
    """
    if not is_sharded(context.placement):
        model = load_model(folder)
        if tokens is not None:
            grow_vocabulary(model, tokens)
        return model
    model, _ = model_on_meta(folder)
    if tokens is not None:
        grow_on_meta(model, tokens.num_rows(model.config.vocab_size))
    products = getattr(torch, compute_dtype(config.dtype, stored_dtype(folder)))
    device = device_of(context.placement)
    offload = context.placement.offload
    shard(model, mesh_of(device), products, offload=offload)
    _fill(model, StoredWeights(folder), device, tokens, offload=offload)
    return model


def load_teacher(folder: Path, context: StageContext) -> TesseraForCausalLM:
    """A model to learn from, in the type that it is stored in: whole on the device, or this rank's part of it.

    Raises:
        CheckpointError: see `load_model`.
    """
    device = device_of(context.placement)
    if not is_sharded(context.placement):
        model = load_model(folder, dtype=None, computes_in=torch.float32, device=device)
        return model.requires_grad_(False)
    model, _ = model_on_meta(folder)
    stored = StoredWeights(folder)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored.dtype(name))
    model.requires_grad_(False)
    offload = context.placement.offload
    shard(model, mesh_of(device), offload=offload)
    _fill(model, stored, device, offload=offload)
    model.model.embed_tokens.computes_in = torch.float32
    return model


def is_sharded(placement: Placement) -> bool:
    """Whether FSDP has the model: where there are several ranks, and where it is in the memory of the node."""
    return placement.offload or (dist.is_initialized() and dist.get_world_size() > 1)


def shard(
    model: TesseraForCausalLM, mesh: DeviceMesh, products: torch.dtype = torch.float32, *, offload: bool = False
) -> None:
    """Shard parameters, gradients and optimizer state over the ranks of a mesh with FSDP2.

    Large decoder layers are gathered one at a time, and so are a large embedding and head; where these share their
    weights they are one unit, whole from the lookup to the loss. Small parts are gathered with the rest of the model,
    because a collective operation for each would cost more than it saves.

    Embedding and head are not gathered in the backward pass: the gradient of a lookup needs no weights, and the losses
    compute the head's gradient with their value. So a loss has to come from `losses`, not from the logits.

    Args:
        model: on the meta device, or whole.
        mesh: of all ranks.
        products: type of matrix products.
        offload: whether parameters, gradients and optimizer state are in the memory of the CPU.
    """
    policy = layer_policy(mesh.device_type, products)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    for layer in model.model.layers:
        if _is_large(layer):
            fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=place)
    embedding, head = model.model.embed_tokens, model.lm_head
    if _is_large(embedding):
        tied = head.weight is embedding.weight
        units: list[list[nn.Module]] = [[embedding, head]] if tied else [[embedding], [head]]
        for unit in units:
            fully_shard(unit, mesh=mesh, offload_policy=place)
            cast("FSDPModule", unit[0]).set_unshard_in_backward(False)
    fully_shard(model, mesh=mesh, offload_policy=place)
    register_fsdp_forward_method(model, "forward_with")
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(ReduceInPieces())  # type: ignore[arg-type]  # its base class is private


def _is_large(module: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in module.parameters()) >= step_memory.OWN_GROUP_PARAMETERS


class ReduceInPieces:
    """Adds up the gradients of a unit over ranks on CPUs, some at a time: gloo copies all that it is given."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for the gradients of a unit, or for this rank's part of them."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Write this rank's part of the sum or mean over the inputs of all ranks; both are vectors."""
        size = max(1, REDUCED_VALUES // group.size())
        inputs = input_tensor.view(group.size(), -1).split(size, dim=1)
        for own, piece in zip(output_tensor.split(size), inputs, strict=True):
            dist.reduce_scatter_single(own, piece.flatten(), op, group=group)


def layer_policy(device_type: str, products: torch.dtype) -> MixedPrecisionPolicy:
    """In which types a decoder layer is gathered and its gradients are reduced; the parts of the ranks stay float32.

    On GPUs layers of a bfloat16 training are gathered in bfloat16, half the traffic, and their gradients are added up
    in float32. The residual stream stays float32, as in a single process, where autocast rounds inputs of products
    alone. On CPUs all is float32 and autocast rounds, so that the numbers are those of a single process. Embedding,
    final norm and head are float32 everywhere, because the loss sums their gradients over chunks of positions.
    """
    if device_type == "cpu" or products == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False)


def rows_of_rank(num_rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The first of the rows that a rank has of a parameter, and the one after the last."""
    size = -(-num_rows // num_ranks)
    return min(rank * size, num_rows), min((rank + 1) * size, num_rows)


def _fill(
    model: TesseraForCausalLM,
    stored: StoredWeights,
    device: torch.device,
    tokens: NewTokens | None = None,
    *,
    offload: bool,
) -> None:
    """Read this rank's part of each weight; then the model is where it is kept, in evaluation mode."""
    model.to_empty(device=torch.device("cpu") if offload else device)
    compute_rotary(model, device)
    for name, parameter in model.named_parameters():
        sharded = cast("DTensor", parameter.detach())
        mesh = sharded.device_mesh
        first, stop = rows_of_rank(sharded.shape[0], mesh.get_local_rank(), mesh.size())
        rows = sharded.to_local()
        assert len(rows) == stop - first, name
        stored.read_rows(name, first, rows)
        if tokens is not None and name in (EMBEDDING, HEAD):
            old = stored.pieces(name, 0, stored.num_rows(name))
            NewRows.computed(((start, piece.float()) for start, piece in old), tokens).write(rows, first)
    model.train(False)


def save_trained(
    model: TesseraForCausalLM, folder: Path, *, tokenizer: Path, dtype: torch.dtype, by_block: bool = False
) -> None:
    """Write a model folder, as `save_model` does. All ranks call it; rank 0 writes, one weight at a time.

    Args:
        model: whole, or sharded.
        folder: created; where it exists, it has to be empty.
        tokenizer: a folder whose tokenizer files are copied into this one.
        dtype: dtype of the written weights.
        by_block: write one file for each sub-block.
    """
    if not isinstance(model, FSDPModule):
        save_model(model, folder, tokenizer=tokenizer, dtype=dtype, by_block=by_block)
        return
    weights = {name: cast("DTensor", weight.detach()) for name, weight in model.named_parameters()}
    if dist.get_rank() > 0:
        while (name := _broadcast_name(None)) is not None:
            _send_rows(weights[name], dtype)
        return
    pieces: Iterator[Tensor] = iter(())

    def fetch(name: str) -> Iterator[Tensor]:
        nonlocal pieces
        pieces = _fetch(weights[name], name, dtype)
        return pieces

    try:
        save_model(model, folder, tokenizer=tokenizer, dtype=dtype, by_block=by_block, fetch=fetch)
    finally:
        for _ in pieces:  # what the others still send where the writing has failed
            pass
        _broadcast_name(None)  # the others wait for the next name


def _broadcast_name(name: str | None) -> str | None:
    """The name that rank 0 sends to the others."""
    names = [name]
    dist.broadcast_object_list(names, src=0)
    return names[0]


def _fetch(weight: DTensor, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """On rank 0: the rows of a weight in order, some at a time, on the CPU; the other ranks send theirs."""
    _broadcast_name(name)
    own, num_ranks = weight.to_local(), weight.device_mesh.size()
    for piece in _in_pieces(own):
        yield piece.to("cpu", dtype)
    for rank in range(1, num_ranks):
        first, stop = rows_of_rank(weight.shape[0], rank, num_ranks)
        for piece in _in_pieces(torch.empty((stop - first, *weight.shape[1:]), dtype=dtype, device="meta")):
            received = torch.empty_like(piece, device=own.device)
            dist.recv(received, src=rank)
            yield received.cpu()


def _send_rows(weight: DTensor, dtype: torch.dtype) -> None:
    """On another rank: send the rows of this one to rank 0."""
    for piece in _in_pieces(weight.to_local()):
        dist.send(piece.to(dtype).contiguous(), dst=0)


def _in_pieces(rows: Tensor) -> Iterator[Tensor]:
    """Some rows at a time."""
    size = max(1, stored_weights.PIECE_VALUES // math.prod(rows.shape[1:]))
    return (rows[start : start + size] for start in range(0, len(rows), size))
