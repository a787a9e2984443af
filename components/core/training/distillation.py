"""What a child learns from its parent: hidden states of the same depth, and the distribution of the next token.

Source: arXiv 2411.19146, section 4.3.

Shape letters: B rows, T tokens, N positions that count, D hidden size.
"""

import torch
from torch import Tensor

from components.core.model.decoder import TesseraForCausalLM
from components.core.text.packing import IGNORE, Batch
from components.core.training.losses import cosine_sum, counted, kl_sum
from components.core.training.step import LossFunction


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


def distillation_loss(parent: TesseraForCausalLM, pairs: list[tuple[int, int]]) -> LossFunction[Batch]:
    """The loss of one micro batch: cosine distance summed over paired layers, plus KL, unweighted as in the paper."""

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
        return {"loss": cosine + kl, "kl": kl, "cosine": cosine}

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
