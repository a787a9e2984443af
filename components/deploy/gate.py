"""The gate: whether a model may be promoted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.deploy.config import Gate

ROUNDING = 1e-9


def check(gate: Gate, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The result of each check of the gate; a missing number fails its check.

    The value decides, not its interval: a threshold is what the recipe asks for, and the interval shows how sure it is.

    Args:
        gate: thresholds; None means no check.
        measured: `accuracy`, `interval`, `gains` and `format` as in metrics.json, and `perplexity_ratio`; empty if
            nothing was measured.

    Returns:
        `check`, `threshold`, `value`, `interval` (None where none was measured) and `passed` of each check.
    """
    found: dict[str, tuple[float | None, list[float] | None]] = {
        "min_accuracy": (_number(measured, "accuracy", "standard", "on"), _accuracy_interval(measured)),
        "min_format": (_lowest_format(measured), None),
        "min_thinking_gain": _thinking_gain(measured),
        "max_perplexity_ratio": (_number(measured, "perplexity_ratio"), None),
    }
    return [
        {
            "check": name,
            "threshold": threshold,
            "value": found[name][0],
            "interval": found[name][1],
            "passed": _passes(name, found[name][0], threshold),
        }
        for name, threshold in gate.model_dump().items()
        if threshold is not None
    ]


def measurements(metrics: Path, role: str) -> dict[str, Any]:
    """Metrics of the model in a role, with its perplexity over the parent's; of the last model if there is none."""
    models: dict[str, dict[str, Any]] = json.loads((metrics / "metrics.json").read_text(encoding="utf-8"))["models"]
    measured = models[evaluated_role(models, role)]
    own, parent = _number(measured, "perplexity"), _number(models, "parent", "perplexity")
    return measured if own is None or parent is None else {**measured, "perplexity_ratio": own / parent}


def evaluated_role(models: Mapping[str, Any], role: str) -> str:
    """The role itself, or that of the last evaluated model if it was not evaluated."""
    return role if role in models else list(models)[-1]


def failed_checks(checks: Sequence[Mapping[str, Any]]) -> str:
    """The failed checks, for a message."""
    return ", ".join(f"{e['check']}={e['threshold']} (found {_found(e)})" for e in checks if not e["passed"])


def _found(check: Mapping[str, Any]) -> str:
    """The value of a check, with its interval."""
    if check["value"] is None or check["interval"] is None:
        return str(check["value"])
    low, high = check["interval"]
    return f"{check['value']:.3f}, 95 % interval {low:.3f} to {high:.3f}"


def _lowest_format(measured: Mapping[str, Any]) -> float | None:
    """Fraction of answers with the right format, in the worse mode."""
    on, off = (_number(measured, "format", mode) for mode in ("on", "off"))
    return None if on is None or off is None else min(on, off)


def _thinking_gain(measured: Mapping[str, Any]) -> tuple[float | None, list[float] | None]:
    """Accuracy with thinking on minus that with thinking off, on hard problems if there are any, and its interval.

    The metrics of earlier versions have no paired gains; then the difference of the accuracies has no interval.
    """
    split = "standard" if _number(measured, "accuracy", "hard", "on") is None else "hard"
    on, off = (_number(measured, "accuracy", split, mode) for mode in ("on", "off"))
    bounds = [_number(measured, "gains", "thinking", split, bound) for bound in ("low", "high")]
    return None if on is None or off is None else on - off, _if_known(bounds)


def _accuracy_interval(measured: Mapping[str, Any]) -> list[float] | None:
    """Interval of the accuracy with thinking on, standard split."""
    interval = measured.get("interval") or {}
    return (interval.get("standard") or {}).get("on")


def _if_known(bounds: Sequence[float | None]) -> list[float] | None:
    """Both bounds of an interval; None if one is missing."""
    known = [bound for bound in bounds if bound is not None]
    return known if len(known) == len(bounds) else None


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
