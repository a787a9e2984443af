"""Small JSON documents with a digest over their contents and their path, so that a reader detects any change.

The digest detects damage, and documents that were exchanged or moved. It is no signature: every writer of a document
can compute it.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

SEAL = "sha256"
"""Key of the digest in a document."""


def seal(path: str, value: Mapping[str, Any]) -> bytes:
    """Serialize a document with its digest.

    Args:
        path: where the document will be stored; part of the digest.
        value: values that JSON can represent.
    """
    plain = json.loads(json.dumps(value))
    return (json.dumps({**plain, SEAL: _digest(path, plain)}, sort_keys=True, indent=1) + "\n").encode()


def unseal(path: str, data: bytes) -> dict[str, Any]:
    """Parse a document and check its digest.

    Raises:
        ValueError: the document was changed, or was written for another path.
    """
    try:
        value = json.loads(data.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict) or value.pop(SEAL, None) != _digest(path, value):
        raise ValueError("the contents do not match their digest")
    return value


def _digest(path: str, value: Mapping[str, Any]) -> str:
    """SHA-256 over path and contents, independent of the layout of the JSON."""
    text = json.dumps([path, value], sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()
