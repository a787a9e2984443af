"""What a report tells of how well a choice is known: each place against the next best, and the noise of that."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MarginNote:
    """A place of the child.

    Attributes:
        told: what the next best is, what it scores more, and how well that is known.
        within_noise: whether other text could have turned the choice; None where that is not known.
    """

    told: str
    within_noise: bool | None


Place = tuple[int, str]
"""Layer of the parent, and `attention` or `ffn`."""


def margin_notes(search: Mapping[str, Any]) -> dict[Place, MarginNote]:
    """A note for each place where something else is within the limits.

    Margins are of the best choice by score; where candidates were distilled and another one was taken, nothing is said.

    Args:
        search: `search.json`.
    """
    candidates = search.get("candidates")
    if candidates and list(search["child"]["choice"]) != list(candidates[0]["choice"]):
        return {}
    return {
        (margin["layer"], margin["part"]): MarginNote(_told(margin), margin["within_noise"])
        for margin in search.get("margins", ())
        if margin["following"] is not None
    }


def noise_sentence(search: Mapping[str, Any]) -> str:
    """How many places of the choice lie within the noise; empty where that is not known."""
    known = [note for note in margin_notes(search).values() if note.within_noise is not None]
    if not known:
        return ""
    count = sum(bool(note.within_noise) for note in known)
    verb = "lies" if count == 1 else "lie"
    what = "the next best is less than two standard errors of the held-out text away"
    return f"{count or 'None'} of {len(known)} places of the choice {verb} within the noise of the scores: {what}."


def _told(margin: Mapping[str, Any]) -> str:
    """A place in words."""
    error = "" if margin["error"] is None else f" ± {margin['error']:.2g}"
    noise = ", within the noise" if margin["within_noise"] else ""
    return f"{margin['chosen']}; next best {margin['following']}, {margin['difference']:+.4g}{error}{noise}"
