"""Small JSON documents that carry a digest over their contents and their place, so that a reader notices any change.

A seal tells damage, and documents that were exchanged or moved; it is no signature, since whoever writes a document can
seal it.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

SEAL = "sha256"
"""Key of the digest in a sealed document."""


def seal(path: str, value: Mapping[str, Any]) -> bytes:
    """A document for a place in a store.

    Args:
        path: where it will lie.
        value: plain JSON-like values.
    """
    plain = json.loads(json.dumps(value))
    return (json.dumps({**plain, SEAL: _digest(path, plain)}, sort_keys=True, indent=1) + "\n").encode()


def unseal(path: str, data: bytes) -> dict[str, Any]:
    """The contents of a document that was read at a place.

    Raises:
        ValueError: it is not whole, or was sealed for another place.
    """
    try:
        value = json.loads(data.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict) or value.pop(SEAL, None) != _digest(path, value):
        raise ValueError("the contents are not those that were sealed")
    return value


def _digest(path: str, value: Mapping[str, Any]) -> str:
    """SHA-256 over place and contents, however the JSON is laid out."""
    text = json.dumps([path, value], sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()
