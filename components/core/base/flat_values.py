"""Nested values as flat ones with dotted names, as MLflow, KFP and tables take them."""

import json
from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted name; lists stay whole, as JSON."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": below for inner, below in flatten(value).items()}
        else:
            flat[key] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among nested values, by dotted name."""
    return {
        name: float(value)
        for name, value in flatten(values).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
