"""How far a child's predictions are from the parent's: several measures from one pass over its last hidden states.

Shape letters: V variants, B rows, N positions that count, D hidden size, W vocabulary, M measures.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.core.text.packing import IGNORE
from components.core.training.losses import CHUNK_LOGITS
from components.search.config import MEASURES


@dataclass(frozen=True)
class Counted:
    """The positions of some rows that count.

    Attributes:
        mask_BT: where they are.
        labels_N: what they should predict.
        rows_NB: 1 in the row of each position.
    """

    mask_BT: Tensor
    labels_N: Tensor
    rows_NB: Tensor

    @classmethod
    def of(cls, labels_BT: Tensor) -> "Counted":
        """The positions whose label counts."""
        mask_BT = labels_BT != IGNORE
        rows_N = mask_BT.nonzero()[:, 0]
        return cls(mask_BT, labels_BT[mask_BT], F.one_hot(rows_N, len(labels_BT)).double())

    @property
    def tokens_of_rows(self) -> Tensor:
        """Positions of each row."""
        return self.mask_BT.sum(dim=1)


def measure_sums(parent_ND: Tensor, children_VND: Tensor, lm_head: nn.Linear, counted: Counted) -> Tensor:
    """Every measure of every child, summed over the positions of each row.

    Args:
        parent_ND: the parent's hidden states after the final norm, at the positions that count.
        children_VND: those of the children.
        lm_head: of all of them.
        counted: the positions.

    Returns:
        (V, B, M), float64, in the order of `MEASURES`; logits are made chunk by chunk.
    """
    sums_VBM = torch.zeros(len(children_VND), counted.rows_NB.shape[1], len(MEASURES), dtype=torch.float64)
    size = max(1, CHUNK_LOGITS // 8 // lm_head.out_features)
    for start in range(0, len(parent_ND), size):
        here = slice(start, start + size)
        parent = Predictions.of(parent_ND[here], lm_head, counted.labels_N[here])
        for child, child_ND in enumerate(children_VND):
            sums_VBM[child] += counted.rows_NB[here].T @ parent.distances(child_ND[here], lm_head)
    return sums_VBM


@dataclass(frozen=True)
class Predictions:
    """What the parent predicts at some positions; computed once for all children."""

    hidden_ND: Tensor
    logprobs_NW: Tensor
    probs_NW: Tensor
    best_N: Tensor
    labels_N: Tensor

    @classmethod
    def of(cls, hidden_ND: Tensor, lm_head: nn.Linear, labels_N: Tensor) -> "Predictions":
        """Predictions from last hidden states."""
        logprobs_NW = F.log_softmax(lm_head(hidden_ND).float(), dim=-1)
        return cls(hidden_ND, logprobs_NW, logprobs_NW.exp(), logprobs_NW.argmax(dim=-1), labels_N)

    def distances(self, child_ND: Tensor, lm_head: nn.Linear) -> Tensor:
        """(N, M), float64, in the order of `MEASURES`: see `Measure`."""
        logprobs_NW = F.log_softmax(lm_head(child_ND).float(), dim=-1)
        lost_NW = self.logprobs_NW - logprobs_NW
        distances = {
            "kl": torch.linalg.vecdot(self.probs_NW, lost_NW).clamp(min=0),
            "lm_loss": lost_NW.gather(1, self.labels_N[:, None])[:, 0],
            "cosine": 1 - F.cosine_similarity(child_ND.float(), self.hidden_ND.float(), dim=-1),
            "top1": (logprobs_NW.argmax(dim=-1) != self.best_N).float(),
        }
        return torch.stack([distances[measure] for measure in MEASURES], dim=1).double()
