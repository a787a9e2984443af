"""Attention over packed rows: a token attends to itself and to the earlier tokens of its own document.

On a GPU it is FlexAttention: its mask is a list of blocks of 128 x 128 pairs, and what lies outside of a document costs
neither time nor memory. On a CPU, where that kernel has no backward pass, and for short rows it is PyTorch's
scaled dot product attention with a mask of T x T.

Source: arXiv 2412.05496.

Shape letters: B rows, T tokens, S keys, H query heads, K key and value heads, E head size, N blocks of a row.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from components.core.model.architecture import MASK_BLOCK, masks_by_blocks

Mask = Tensor | BlockMask | None
"""Which keys a query attends to: a boolean (B, 1, T, S), or blocks; None for causal attention."""

RECOMPILE_LIMIT = 64
"""Kernels that are compiled before PyTorch falls back to scores of T x T. Each number of KV heads needs its own, with
and without a backward pass; the default of 8 is too few for a searched child and its teacher."""


def packed_mask(segment_ids_BT: Tensor, head_dim: int) -> Mask:
    """The mask of packed rows, the same for all layers.

    Args:
        segment_ids_BT: number of the document of each token; the tokens of a document are contiguous.
        head_dim: size of a head.
    """
    on_gpu = segment_ids_BT.device.type != "cpu"
    if masks_by_blocks(segment_ids_BT.shape[1], head_dim, on_gpu=on_gpu):
        return block_mask(segment_ids_BT)
    return segment_mask(segment_ids_BT)


def segment_mask(segment_ids_BT: Tensor) -> Tensor | None:
    """Boolean mask of packed rows, (B, 1, T, T): a query attends to earlier keys of its own document, and to itself.

    None, for causal attention without a mask, which is faster, where each row is one document.
    """
    if bool((segment_ids_BT == segment_ids_BT[:, :1]).all()):
        return None
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same_BTT.tril()[:, None]


def block_mask(segment_ids_BT: Tensor) -> BlockMask:
    """The mask of packed rows for FlexAttention: the blocks of keys that each block of queries attends to.

    PyTorch's `create_block_mask` makes a mask of T x T first, or compiles. Documents are contiguous, so here the blocks
    follow from the first and the last document of each. No value is read back from the device.
    """
    T = segment_ids_BT.shape[1]
    begins_BT = segment_ids_BT.diff(dim=1, prepend=segment_ids_BT[:, :1]) != 0
    documents_BT = begins_BT.cumsum(dim=1, dtype=torch.int32)
    # What fills the last block is a document of its own, which has a higher number than all others.
    blocks_BNS = F.pad(documents_BT, (0, -T % MASK_BLOCK), value=T).unflatten(1, (-1, MASK_BLOCK))
    first_BN, last_BN = blocks_BNS[..., 0], blocks_BNS[..., -1]
    attends_BNN = (last_BN[:, None, :] >= first_BN[:, :, None]).tril()
    full_BNN = (first_BN[:, None, :] == last_BN[:, :, None]).tril(-1)  # causal within the block on the diagonal
    partial_BNN = attends_BNN & ~full_BNN

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents_BT[batch, query] == documents_BT[batch, key])

    kv_num_blocks, kv_indices = _listed(partial_BNN)
    full_kv_num_blocks, full_kv_indices = _listed(full_BNN)
    q_num_blocks, q_indices = _listed(partial_BNN.mT)
    full_q_num_blocks, full_q_indices = _listed(full_BNN.mT)
    return BlockMask(
        seq_lengths=(T, T),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(MASK_BLOCK, MASK_BLOCK),
        mask_mod=attends,
    )


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Mask) -> Tensor:
    """Values weighted by the softmax of the scores, (B, H, T, E); K divides H, and a group of query heads shares keys.

    Args:
        q_BHTE: queries.
        k_BKSE: keys.
        v_BKSE: values.
        mask: of `packed_mask`, or a boolean one; None for causal attention.
    """
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    if isinstance(mask, BlockMask):
        return attend_by_blocks(q_BHTE, k_BKSE, v_BKSE, mask, grouped)
    causal = mask is None and q_BHTE.shape[2] > 1
    return F.scaled_dot_product_attention(q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def attend_by_blocks(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: BlockMask, grouped: bool) -> Tensor:
    """FlexAttention. Outside of a compiled layer its kernel is compiled alone: uncompiled, it makes scores of T x T."""
    device = q_BHTE.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q_BHTE.dtype
    function: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    mixed: Tensor = function(q_BHTE.to(dtype), k_BKTE.to(dtype), v_BKTE.to(dtype), block_mask=mask, enable_gqa=grouped)
    return mixed


@cache
def _compiled() -> Callable[..., Tensor]:
    """The compiled function, made at its first use: PyTorch's compiler takes a second to import."""
    compiled: Callable[..., Tensor] = torch.compile(  # type: ignore[call-overload]  # its hints lack the argument
        flex_attention, recompile_limit=RECOMPILE_LIMIT
    )
    return compiled


def _listed(mask_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of a row are in the mask, (B, 1, N), and their numbers, (B, 1, N, N), first of all others."""
    counts_BN = mask_BNN.sum(dim=-1, dtype=torch.int32)
    numbers_BNN = mask_BNN.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts_BN[:, None], numbers_BNN.contiguous()[:, None]
