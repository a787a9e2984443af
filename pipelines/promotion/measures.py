"""What a promotion may be decided by, and the key of what is served, for the command line too: it imports nothing."""

from typing import Literal, get_args

Measure = Literal["accuracy_on", "accuracy_off", "format", "perplexity", "speed"]
"""Accuracy with thinking on and off, fraction of answers in the format of their mode, perplexity on held-out text, and
tokens per second."""
MEASURES: tuple[Measure, ...] = get_args(Measure)
RELATIVE: tuple[Measure, ...] = ("perplexity", "speed")
"""Measures whose difference is a fraction of the champion's value."""


def served_key(model: str) -> str:
    """Dotted key of the digest of a served model in values of the chart `helm/tessera`."""
    return f"serving.models.{model}.digest"
