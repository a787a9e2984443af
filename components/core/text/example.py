"""A tokenized document. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One document: its tokens, and which of them count in the loss."""

    token_ids: Sequence[int]
    counts: Sequence[bool]
    """True where predicting this token counts."""
