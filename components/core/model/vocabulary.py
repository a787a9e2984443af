"""Gives embedding and head rows for new tokens, in a model that is whole in memory or in a part of one.

The row of a new token is the mean of those of related tokens, at the median norm of the old rows: so the model can tell
new tokens apart from the first step on, which equal rows of a tied embedding prevent. Other rows that are added, such
as those that fill up the multiple of `ROWS_MULTIPLE`, are the mean of all.

Shape letters: V old rows, D hidden size, N rows of a piece.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.core.model.decoder import TesseraForCausalLM

ROWS_MULTIPLE = 64
"""Rows that are added to a vocabulary make its size a multiple of this: matrix products of such sizes are faster."""


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a model gets rows for.

    Attributes:
        num_tokens: tokens of the new vocabulary; a larger one of the model stays.
        related: for the id of a new token, ids of old tokens whose words say what it stands for. The model may have a
            row for it already, which was never trained.
    """

    num_tokens: int
    related: Mapping[int, Sequence[int]]

    def num_rows(self, num_old: int) -> int:
        """Rows of the grown vocabulary."""
        return num_old if self.num_tokens <= num_old else -(-self.num_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE


@dataclass(frozen=True)
class NewRows:
    """The rows of a grown embedding or head that are not those of the old one.

    Attributes:
        num_old: rows of the old one.
        mean_D: the mean of the old rows.
        of_tokens: rows of new tokens, by id.
    """

    num_old: int
    mean_D: Tensor
    of_tokens: Mapping[int, Tensor]

    @classmethod
    def computed(cls, pieces_ND: Iterable[tuple[int, Tensor]], tokens: NewTokens) -> "NewRows":
        """Compute the new rows.

        Args:
            pieces_ND: all old rows, in pieces: the number of the first row, and the rows.
            tokens: the new tokens.
        """
        words = {word for words in tokens.related.values() for word in words}
        rows_of: dict[int, Tensor] = {}
        sums, norms, num_old = [], [], 0
        for first, piece_ND in pieces_ND:
            num_old = first + len(piece_ND)
            sums.append(piece_ND.sum(dim=0))
            norms.append(piece_ND.norm(dim=1))
            rows_of |= {word: piece_ND[word - first].clone() for word in words if first <= word < num_old}
        total_D = sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)
        usual_norm = torch.cat(norms).median()
        of_tokens = {}
        for token, related in tokens.related.items():
            mean_D = torch.stack([rows_of[word] for word in related]).mean(dim=0)
            of_tokens[token] = mean_D * (usual_norm / mean_D.norm())
        return cls(num_old, total_D / num_old, of_tokens)

    @torch.no_grad()
    def write(self, rows_ND: Tensor, first: int) -> None:
        """Write the new ones among the rows `first …` of the grown matrix."""
        rows_ND[max(0, self.num_old - first) :] = self.mean_D.to(rows_ND.device)
        for token, row_D in self.of_tokens.items():
            if first <= token < first + len(rows_ND):
                rows_ND[token - first] = row_D.to(rows_ND.device)


def grow_vocabulary(model: TesseraForCausalLM, tokens: NewTokens) -> None:
    """Give a model that is whole in memory rows for new tokens, in place."""
    embedding, head = model.model.embed_tokens, model.lm_head
    num_rows = tokens.num_rows(model.config.vocab_size)
    grown = _grown(embedding.weight, num_rows, tokens)
    tied = model.config.tie_word_embeddings
    _replace(model, grown, grown if tied else _grown(head.weight, num_rows, tokens))


def grow_on_meta(model: TesseraForCausalLM, num_rows: int) -> None:
    """Set the number of rows of a model on the meta device."""

    def empty() -> nn.Parameter:
        return nn.Parameter(torch.empty(num_rows, model.config.hidden_size, device="meta"))

    weight = empty()
    _replace(model, weight, weight if model.config.tie_word_embeddings else empty())


def _replace(model: TesseraForCausalLM, embedding: nn.Parameter, head: nn.Parameter) -> None:
    model.model.embed_tokens.weight, model.lm_head.weight = embedding, head
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = model.config.vocab_size = len(embedding)


def _grown(weight: Tensor, num_rows: int, tokens: NewTokens) -> nn.Parameter:
    old_VD = weight.data
    rows_ND = old_VD.new_empty(num_rows, old_VD.shape[1])
    rows_ND[: len(old_VD)] = old_VD
    NewRows.computed([(0, old_VD)], tokens).write(rows_ND, 0)
    return nn.Parameter(rows_ND)
