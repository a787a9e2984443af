"""The gate: whether a model may become the champion."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.deploy.config import Gate

ROUNDING = 1e-9


def check(gate: Gate, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The result of each check of the gate; a missing number fails its check.

    Args:
        gate: thresholds; None means no check.
        measured: `accuracy` and `format` as in metrics.json, `perplexity_ratio`; empty if it was not measured.

    Returns:
        `check`, `threshold`, `value` and `passed` of each check.
    """
    found = {
        "min_accuracy": _number(measured, "accuracy", "standard", "on"),
        "min_format": _lowest_format(measured),
        "min_thinking_gain": _thinking_gain(measured),
        "max_perplexity_ratio": _number(measured, "perplexity_ratio"),
    }
    return [
        {"check": name, "threshold": threshold, "value": found[name], "passed": _passes(name, found[name], threshold)}
        for name, threshold in gate.model_dump().items()
        if threshold is not None
    ]


def measurements(metrics: Path, role: str) -> dict[str, Any]:
    """Metrics of the model in a role, with its perplexity over the parent's; of the last model if there is none."""
    models: dict[str, dict[str, Any]] = json.loads((metrics / "metrics.json").read_text(encoding="utf-8"))["models"]
    measured = models.get(role) or list(models.values())[-1]
    own, parent = _number(measured, "perplexity"), _number(models, "parent", "perplexity")
    return measured if own is None or parent is None else {**measured, "perplexity_ratio": own / parent}


def failed_checks(checks: Sequence[Mapping[str, Any]]) -> str:
    """The failed checks, for a message."""
    return ", ".join(f"{e['check']}={e['threshold']} (found {e['value']})" for e in checks if not e["passed"])


def _lowest_format(measured: Mapping[str, Any]) -> float | None:
    """Fraction of answers with the right format, in the worse mode."""
    on, off = (_number(measured, "format", mode) for mode in ("on", "off"))
    return None if on is None or off is None else min(on, off)


def _thinking_gain(measured: Mapping[str, Any]) -> float | None:
    """Accuracy with thinking on minus that with thinking off, on hard problems if there are any."""
    split = "standard" if _number(measured, "accuracy", "hard", "on") is None else "hard"
    on, off = (_number(measured, "accuracy", split, mode) for mode in ("on", "off"))
    return None if on is None or off is None else on - off


def _number(measured: Mapping[str, Any], *path: str) -> float | None:
    """The number under a path of keys in `measured`; None if a key is missing."""
    value: Any = measured
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _passes(check: str, value: float | None, threshold: float) -> bool:
    """Whether a number is on the right side of its threshold; an error of rounding does not fail it."""
    if value is None:
        return False
    return value <= threshold + ROUNDING if check.startswith("max_") else value >= threshold - ROUNDING
