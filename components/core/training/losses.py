"""Losses, each summed over the positions that count: cross-entropy, KL, distances of states, and that of distillation.

Logits of a large vocabulary are never whole in memory: they are computed for some positions at a time, and the
gradient with them, so that the backward pass computes no logits again.

Shape letters: B rows, T tokens, N positions that count, n positions of one chunk, D hidden size, V vocabulary, K tokens
that the teacher finds most likely.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import LinearCrossEntropyOptions

from components.core.model.decoder import TesseraForCausalLM
from components.core.model.layers import rms_norm
from components.core.text.packing import IGNORE, Batch
from components.core.training.step_memory import CHUNK_LOGITS
from components.core.training.train_config import HiddenStateLoss

BatchT = TypeVar("BatchT")

LossFunction = Callable[[TesseraForCausalLM, BatchT], dict[str, Tensor]]
"""From model and micro batch to sums over its counted positions: `loss`, with gradient, and terms for the curves."""

Norm = Callable[[Tensor], Tensor]
"""A norm over the hidden size."""

LAST = -1
"""Index of the hidden states after the final norm."""

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""Function from the logits (n, V) of a slice of positions to their summed loss; it overwrites the logits with the
gradient of the loss."""


def counted(hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and labels of the positions that count: (N, D) and (N,)."""
    mask_BT = labels_BT != IGNORE
    return hidden_BTD[mask_BT], labels_BT[mask_BT]


def next_token_loss(model: TesseraForCausalLM, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of the tokens that count, nats, summed."""
    output = model.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
    hidden_ND, labels_N = counted(output.last_hidden_state, batch.labels_BT)
    return {"loss": cross_entropy_sum(hidden_ND, labels_N, model.lm_head)}


def cross_entropy_sum(hidden_ND: Tensor, labels_N: Tensor, lm_head: nn.Linear) -> Tensor:
    """Next-token cross-entropy, nats, summed.

    PyTorch's `linear_cross_entropy` computes it, but not in bfloat16: there it rounds the sum to bfloat16, and on a CPU
    it multiplies in float32. Here only the matrix products are in bfloat16.
    """
    if _compute_dtype(hidden_ND).itemsize >= torch.float32.itemsize:
        return _computed_by(
            lm_head, hidden_ND, lambda states_ND: _linear_cross_entropy(states_ND, labels_N, lm_head, reduction="sum")
        )

    def chunk_loss(logits_nV: Tensor, chunk: slice) -> Tensor:
        labels_n1 = labels_N[chunk, None]
        logprobs_nV = logits_nV.sub_(logits_nV.logsumexp(dim=-1, keepdim=True))
        loss = -logprobs_nV.gather(1, labels_n1).sum()
        logprobs_nV.exp_().scatter_add_(1, labels_n1, logits_nV.new_full(labels_n1.shape, -1.0))
        return loss

    return _chunked_sum(hidden_ND, lm_head, chunk_loss)


def kl_sum(
    student_ND: Tensor,
    teacher_ND: Tensor,
    student_head: nn.Linear,
    teacher_head: nn.Linear,
    top_k: int | None = None,
) -> Tensor:
    """KL(teacher || student) of the next-token distributions, nats, summed over positions.

    Args:
        student_ND: hidden states of the student at the positions that count.
        teacher_ND: hidden states of the teacher at the same positions; no gradient flows into them.
        student_head: maps student states to logits.
        teacher_head: maps teacher states to logits of the same vocabulary.
        top_k: the distributions are over so many tokens that the teacher finds most likely at each position, and all
            others as one. Such a KL is never larger than that over all tokens; None: over all tokens.

    Source: arXiv 2411.19146, section 4.3; without the share of all other tokens the student would be too confident:
    arXiv 2503.16870.
    """
    vocabulary = len(student_head.weight)
    num_top = vocabulary if top_k is None else min(top_k, vocabulary)

    @torch.no_grad()
    def chunk_loss(logits_nV: Tensor, chunk: slice) -> Tensor:
        teacher_nV = F.log_softmax(_at_least_float32(teacher_head.forward(teacher_ND[chunk])), dim=-1)
        student_nV = logits_nV.sub_(logits_nV.logsumexp(dim=-1, keepdim=True))
        return _top_k_kl(student_nV, teacher_nV, num_top) if num_top < vocabulary else _kl(student_nV, teacher_nV)

    with gathered(teacher_head):
        return _chunked_sum(student_ND, student_head, chunk_loss)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """The weights of a layer are whole in the block, if it is sharded by itself; no gradients flow into them.

    Call its `forward`, not the layer: the hooks of FSDP would shard it again after each call.
    """
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def _kl(student_nV: Tensor, teacher_nV: Tensor) -> Tensor:
    """Sum of the KL of log-probabilities; those of the student become the gradient, those of the teacher are lost."""
    log_ratio_nV = teacher_nV - student_nV
    probs_nV = teacher_nV.exp_()
    loss = log_ratio_nV.mul_(probs_nV).sum()
    student_nV.exp_().sub_(probs_nV)
    return loss


def _top_k_kl(student_nV: Tensor, teacher_nV: Tensor, num_top: int) -> Tensor:
    """The same over the teacher's most likely tokens and all others as one; overwrites likewise."""
    top_nK = teacher_nV.topk(num_top, dim=-1).indices
    teacher_nK, teacher_rest_n1 = _split_off(teacher_nV, top_nK)
    student_nK, student_rest_n1 = _split_off(student_nV, top_nK)
    log_ratio_n1 = teacher_rest_n1 - student_rest_n1
    loss = (teacher_nK.exp() * (teacher_nK - student_nK)).sum() + (teacher_rest_n1.exp() * log_ratio_n1).sum()
    # The others together should have the probability that the teacher gives them, divided as the student divides it.
    wanted_nV = torch.add(student_nV, log_ratio_n1, out=teacher_nV).exp_()
    student_nV.exp_().sub_(wanted_nV).scatter_(1, top_nK, student_nK.exp_().sub_(teacher_nK.exp_()))
    return loss


def _split_off(logprobs_nV: Tensor, top_nK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of some tokens, and of all others together, (n, 1); what was split off is -inf afterwards."""
    logprobs_nK = logprobs_nV.gather(1, top_nK)
    return logprobs_nK, logprobs_nV.scatter_(1, top_nK, -torch.inf).logsumexp(dim=-1, keepdim=True)


def cosine_sum(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cos of paired hidden states, summed over positions. Source: arXiv 2411.19146, section 4.3."""
    return (1 - F.cosine_similarity(student_ND, teacher_ND, dim=-1)).sum()


def mse_sum(student_ND: Tensor, teacher_ND: Tensor, norm: Norm | None = None) -> Tensor:
    """Squared difference of paired hidden states after a norm, mean over the hidden size, summed over positions.

    Args:
        student_ND: the only input that receives gradient.
        teacher_ND: hidden states of the teacher.
        norm: that the teacher has next; None for states after its last norm.

    Source: arXiv 2407.14679, section 3.
    """
    if norm is not None:
        student_ND, teacher_ND = norm(student_ND), norm(teacher_ND)
    return F.mse_loss(student_ND, teacher_ND, reduction="sum") / student_ND.shape[-1]


def token_logprobs(hidden_ND: Tensor, labels_N: Tensor, lm_head: nn.Linear) -> Tensor:
    """Log-probability of each label, nats, shape (N,); float32 at least. Not for a sharded head."""
    return -_linear_cross_entropy(_at_least_float32(hidden_ND), labels_N, lm_head, reduction="none")


def paired_layers(parent: TesseraForCausalLM, child: TesseraForCausalLM) -> list[tuple[int, int]]:
    """Pairs (parent, child) of hidden states of the same depth; index 0 is the embedding's output.

    The search writes `parent_layers` into the child's configuration: for each child layer, the number of parent layers
    whose work its output contains. Without it, models of equal depth pair one to one, others only their last states.

    Source: arXiv 2411.19146, section 4.3.
    """
    depth = child.config.num_hidden_layers
    parent_depths = getattr(child.config, "parent_layers", None)
    if parent_depths is None:
        same = depth == parent.config.num_hidden_layers
        parent_depths = list(range(1, depth + 1)) if same else []
    pairs = [(int(parent_depth), layer) for layer, parent_depth in enumerate(parent_depths, 1)]
    return [(p, c) for p, c in pairs if p < parent.config.num_hidden_layers and c < depth] + [(LAST, LAST)]


def next_norms(parent: TesseraForCausalLM, pairs: list[tuple[int, int]]) -> list[Norm | None]:
    """For each pair, the norm that the parent applies to its hidden states next; None for those after its last one.

    All ranks call it: where the parent is sharded, its norms are gathered, once.
    """
    return [None if depth == LAST else _next_norm(parent, depth) for depth, _ in pairs]


def _next_norm(parent: TesseraForCausalLM, depth: int) -> Norm:
    layers: Any = parent.model.layers[depth:]
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    own = next((norm for norm in norms if norm is not None), parent.model.norm)
    weight_D = own.weight.detach()
    if isinstance(weight_D, DTensor):
        weight_D = weight_D.full_tensor().to(weight_D.device_mesh.device_type)  # from the CPU, where it is offloaded
    return partial(rms_norm, weight_D=weight_D, eps=own.eps)


def distillation_loss(
    parent: TesseraForCausalLM,
    pairs: list[tuple[int, int]],
    hidden_state_loss: HiddenStateLoss | None = "cosine",
    top_k_logits: int | None = None,
) -> LossFunction[Batch]:
    """The loss of one micro batch: KL, plus the distance of hidden states summed over paired layers.

    Args:
        parent: the teacher; all ranks call this function.
        pairs: of hidden states, as `paired_layers` finds them.
        hidden_state_loss: distance. Cosine is added to the KL as it is (arXiv 2411.19146, section 4.3). The squared
            difference is weighted so that it is as large as the KL (arXiv 2407.14679, section 3), anew in each micro
            batch of a rank. None: the KL alone.
        top_k_logits: see `kl_sum`.
    """
    norms = next_norms(parent, pairs) if hidden_state_loss == "mse" else []
    states_of = last_hidden_state if hidden_state_loss is None else hidden_states

    def loss(child: TesseraForCausalLM, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher = parent.forward_with(states_of, batch)
        student = states_of(child, batch)
        student_ND, _ = counted(student[-1], batch.labels_BT)
        teacher_ND, _ = counted(teacher[-1], batch.labels_BT)
        kl = kl_sum(student_ND, teacher_ND, child.lm_head, parent.lm_head, top_k_logits)
        if isinstance(parent, FSDPModule):
            parent.reshard()  # what has no unit of its own stays gathered after a forward pass
        if hidden_state_loss is None:
            return {"loss": kl, "kl": kl}
        mask_BT = batch.labels_BT != IGNORE
        if hidden_state_loss == "cosine":
            cosine = torch.stack([cosine_sum(student[c][mask_BT], teacher[p][mask_BT]) for p, c in pairs]).sum()
            return {"loss": cosine + kl, "kl": kl, "cosine": cosine}
        distances = [
            mse_sum(student[c][mask_BT], teacher[p][mask_BT], norm) for (p, c), norm in zip(pairs, norms, strict=True)
        ]
        mse = torch.stack(distances).sum()
        return {"loss": kl + torch.where(mse > 0, kl / mse, 0.0).detach() * mse, "kl": kl, "mse": mse}

    return loss


def hidden_states(model: TesseraForCausalLM, batch: Batch) -> tuple[Tensor, ...]:
    """Hidden states (B, T, D): the embedding's output, then each layer's, the last after the final norm."""
    states: tuple[Tensor, ...] = _output(model, batch, output_hidden_states=True).hidden_states
    return states


def last_hidden_state(model: TesseraForCausalLM, batch: Batch) -> tuple[Tensor, ...]:
    """The last of them alone: the others are not kept."""
    return (_output(model, batch).last_hidden_state,)


def _output(model: TesseraForCausalLM, batch: Batch, **more: bool) -> Any:
    return model.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT, **more)


def _linear_cross_entropy(hidden_ND: Tensor, labels_N: Tensor, lm_head: nn.Linear, *, reduction: str) -> Tensor:
    """PyTorch's function with our chunk size; with its own choice it is seven times slower on a CPU."""
    weight_VD = lm_head.weight.to(hidden_ND.dtype)
    options = LinearCrossEntropyOptions(batch_chunk_size=_chunk_rows(len(hidden_ND), len(weight_VD)))
    return F.linear_cross_entropy(hidden_ND, weight_VD, labels_N, reduction=reduction, options=options)


def _chunked_sum(hidden_ND: Tensor, lm_head: nn.Linear, chunk_loss: ChunkLoss) -> Tensor:
    """Sum of `chunk_loss` over all positions, differentiable in hidden states and head."""

    def loss(states_ND: Tensor) -> Tensor:
        weight_VD = lm_head.weight
        if torch.is_grad_enabled() and (states_ND.requires_grad or weight_VD.requires_grad):
            total: Tensor = _ChunkedLoss.apply(states_ND, weight_VD, chunk_loss)  # type: ignore[no-untyped-call]
            return total
        chunks = _chunks(len(states_ND), len(weight_VD))
        losses = [chunk_loss(_at_least_float32(lm_head.forward(states_ND[chunk])), chunk) for chunk in chunks]
        return torch.stack(losses).sum() if losses else states_ND.new_zeros(())

    return _computed_by(lm_head, hidden_ND, loss)


def _computed_by(lm_head: nn.Linear, hidden_ND: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """A loss of hidden states, as the forward pass of the head where that is sharded by itself.

    So FSDP gathers the weights for it and reduces their gradients. In the backward pass they are not gathered (see
    `sharding.shard`): gradients are computed with the loss.
    """
    if not isinstance(lm_head, FSDPModule):
        return loss(hidden_ND)
    lm_head.unshard()  # what FSDP gathers within a forward pass has a second copy until the next unit is gathered
    summed: Tensor = lm_head(hidden_ND, loss)
    return summed


class _ChunkedLoss(torch.autograd.Function):
    """A loss of logits whose gradient is computed with it, chunk by chunk; the backward pass only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, chunk_loss: ChunkLoss) -> Tensor:
        dtype = _compute_dtype(hidden_ND)
        inputs_ND, matrix_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        hidden_grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        weight_grad_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        for chunk in _chunks(len(hidden_ND), len(weight_VD)):
            logits_nV = _at_least_float32(F.linear(inputs_ND[chunk], matrix_VD))
            total += chunk_loss(logits_nV, chunk)
            gradient_nV = logits_nV.to(dtype)
            if hidden_grad_ND is not None:
                hidden_grad_ND[chunk] = gradient_nV @ matrix_VD
            if weight_grad_VD is not None and weight_grad_VD.dtype == dtype:
                weight_grad_VD.addmm_(gradient_nV.T, inputs_ND[chunk])
            elif weight_grad_VD is not None:
                weight_grad_VD += gradient_nV.T @ inputs_ND[chunk]
        ctx.gradients = hidden_grad_ND, weight_grad_VD
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of a chunked loss can be taken only once; compute the loss again first")
        return (*(None if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in gradients), None)


def _compute_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Type that the product of hidden states with the head is computed in."""
    device = hidden_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _chunk_rows(num_rows: int, vocabulary: int) -> int:
    """Positions of a chunk: the fewest chunks that `CHUNK_LOGITS` allows, all about equally large."""
    num_chunks = -(-num_rows // max(1, CHUNK_LOGITS // vocabulary))
    return -(-num_rows // max(1, num_chunks)) or 1


def _chunks(num_rows: int, vocabulary: int) -> Iterator[slice]:
    rows = _chunk_rows(num_rows, vocabulary)
    return (slice(start, start + rows) for start in range(0, num_rows, rows))
