"""Whether a model may become the champion."""

from collections.abc import Mapping
from typing import Any

from components.deploy.config import Gate


def check(gate: Gate, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each check with what was measured and whether it passed; a number that is missing does not pass.

    Args:
        gate: thresholds.
        measured: the model's entry in metrics.json: `accuracy`, `format`.
    """
    accuracy, kept = measured.get("accuracy", {}), measured.get("format") or {}
    modes = [kept.get(mode) for mode in ("on", "off")]
    lowest = None if None in modes else min(float(mode) for mode in modes if mode is not None)
    split = "hard" if (accuracy.get("hard") or {}).get("on") is not None else "standard"
    on, off = ((accuracy.get(split) or {}).get(mode) for mode in ("on", "off"))
    found = {
        "min_accuracy": (accuracy.get("standard") or {}).get("on"),
        "min_format": lowest,
        "min_thinking_gain": None if on is None or off is None else on - off,
    }
    return [
        {"check": name, "threshold": threshold, "value": found[name], "passed": _at_least(found[name], threshold)}
        for name, threshold in gate.model_dump().items()
        if threshold is not None
    ]


def _at_least(value: float | None, threshold: float) -> bool:
    return value is not None and value >= threshold
