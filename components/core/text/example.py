"""A tokenized document. Light: no torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One document: its tokens, and the mask of those that count in the loss."""

    token_ids: Sequence[int]
    counts: Sequence[bool]
    """True where predicting this token counts."""
