"""Losses that two stages share, summed over the positions that count.

Logits of a large vocabulary are never whole in memory.

Shape letters: B rows, T tokens, N positions that count, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.core.text.packing import IGNORE

CHUNK_LOGITS = 1 << 24
"""Logits held at once: 64 MiB in float32."""


def counted(hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and labels of the positions that count: (N, D) and (N,)."""
    mask_BT = labels_BT != IGNORE
    return hidden_BTD[mask_BT], labels_BT[mask_BT]


def cross_entropy_sum(hidden_ND: Tensor, labels_N: Tensor, lm_head: nn.Module) -> Tensor:
    """Next-token cross-entropy, nats, summed; logits are made chunk by chunk, and again for the gradient."""

    def loss_of(hidden_nD: Tensor, labels_n: Tensor) -> Tensor:
        return F.cross_entropy(lm_head(hidden_nD).float(), labels_n, reduction="sum")

    return _sum_over_chunks(loss_of, hidden_ND, labels_N, vocabulary=_vocabulary(lm_head))


def kl_sum(student_ND: Tensor, teacher_ND: Tensor, student_head: nn.Module, teacher_head: nn.Module) -> Tensor:
    """KL(teacher || student) of the next-token distributions, nats, summed over positions.

    Args:
        student_ND: hidden states of the student at the positions that count.
        teacher_ND: hidden states of the teacher at the same positions; no gradient flows into them.
        student_head: maps student states to logits.
        teacher_head: maps teacher states to logits of the same vocabulary.

    Source: arXiv 2411.19146, section 4.3.
    """

    def loss_of(student_nD: Tensor, teacher_nD: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_nV = F.log_softmax(teacher_head(teacher_nD).float(), dim=-1)
        student_nV = F.log_softmax(student_head(student_nD).float(), dim=-1)
        return F.kl_div(student_nV, teacher_nV, reduction="sum", log_target=True)

    return _sum_over_chunks(loss_of, student_ND, teacher_ND, vocabulary=_vocabulary(student_head))


def cosine_sum(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cos of paired hidden states, summed over positions. Source: arXiv 2411.19146, section 4.3."""
    return (1 - F.cosine_similarity(student_ND, teacher_ND, dim=-1)).sum()


def token_logprobs(hidden_ND: Tensor, labels_N: Tensor, lm_head: nn.Module) -> Tensor:
    """Log-probability of each label, nats, shape (N,)."""
    logits_NV = lm_head(hidden_ND).float()
    return -F.cross_entropy(logits_NV, labels_N, reduction="none")


def _sum_over_chunks(loss_of, first, second, *, vocabulary: int) -> Tensor:  # type: ignore[no-untyped-def]
    """Sum `loss_of` over chunks of positions small enough that their logits stay below `CHUNK_LOGITS`."""
    size = max(1, CHUNK_LOGITS // vocabulary)
    if first.shape[0] <= size:
        total: Tensor = loss_of(first, second)
        return total
    chunks = zip(first.split(size), second.split(size), strict=True)
    return torch.stack([checkpoint(loss_of, a, b, use_reentrant=False) for a, b in chunks]).sum()


def _vocabulary(lm_head: nn.Module) -> int:
    """Rows of the output embedding."""
    weight = lm_head.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0])
