"""What a promotion may be decided by, for the command line too: it imports nothing."""

from typing import Literal, get_args

Measure = Literal["accuracy_on", "accuracy_off", "format", "perplexity", "speed"]
"""Accuracy with thinking on and off, fraction of answers in the format of their mode, perplexity on held-out text, and
tokens per second."""
MEASURES: tuple[Measure, ...] = get_args(Measure)
RELATIVE: tuple[Measure, ...] = ("perplexity", "speed")
"""Measures whose difference is a fraction of the champion's value."""
DEFAULT_KEY = "serving.model.digest"
"""Dotted key of the digest in a file of values."""
