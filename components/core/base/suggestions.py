"""Spelling suggestions for an unknown name."""

import difflib
from collections.abc import Sequence


def nearest(name: str, known: Sequence[str]) -> str | None:
    """A hint that names the most similar of the known names, or all of them where none is similar."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {', '.join(sorted(known))}" if known else None
