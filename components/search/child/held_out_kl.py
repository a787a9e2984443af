"""How far models are from their parent on held-out text, row by row, so that differences come with their error.

Shape letters: B rows, T tokens, N positions that count, D hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.core.model.decoder import TesseraForCausalLM
from components.core.text.packing import Batch
from components.core.training.losses import counted, kl_sum


@dataclass(frozen=True)
class HeldOut:
    """KL(parent || model) on packed rows.

    Attributes:
        sums: of each row, nats.
        tokens: positions that count, of each row.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def kl(self) -> float:
        """Nats a token, never below 0."""
        return max(0.0, sum(self.sums) / sum(self.tokens))

    def minus(self, other: "HeldOut") -> tuple[float, float]:
        """Difference of the means on the same rows, and its standard error: rows differ, but alike for both."""
        total = sum(self.tokens)
        mean = (sum(self.sums) - sum(other.sums)) / total
        rest = [a - b - mean * n for a, b, n in zip(self.sums, other.sums, self.tokens, strict=True)]
        rows = len(rest)
        error = math.sqrt(sum(x * x for x in rest) * rows / (rows - 1)) / total if rows > 1 else math.inf
        return mean, error


@torch.no_grad()
def held_out_kl(
    parent: TesseraForCausalLM, models: Sequence[TesseraForCausalLM], batches: Sequence[Batch]
) -> list[HeldOut]:
    """KL of each model from the parent; what the parent says is computed once."""
    sums: list[list[float]] = [[] for _ in models]
    tokens: list[int] = []
    for batch in batches:
        teacher_BTD = _hidden(parent, batch)
        students = [_hidden(model, batch) for model in models]
        for row in range(len(teacher_BTD)):
            labels_1T = batch.labels_BT[row : row + 1]
            teacher_ND, labels_N = counted(teacher_BTD[row : row + 1], labels_1T)
            if not len(labels_N):
                continue
            tokens.append(len(labels_N))
            for model, student_BTD, found in zip(models, students, sums, strict=True):
                student_ND, _ = counted(student_BTD[row : row + 1], labels_1T)
                found.append(float(kl_sum(student_ND, teacher_ND, model.lm_head, parent.lm_head)))
    return [HeldOut(tuple(found), tuple(tokens)) for found in sums]


def _hidden(model: TesseraForCausalLM, batch: Batch) -> Tensor:
    """Hidden states after the final norm."""
    output = model.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD
