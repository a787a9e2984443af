"""What a stage reports while it works, and the JSONL file that keeps it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from components.core.base.fault_injection import fault_point


class Reporter(Protocol):
    """Receives what happens in a stage, in order."""

    def emit(self, event: Mapping[str, object]) -> None:
        """Take one event: a plain JSON object with at least `type` and `time`."""


class Events:
    """Appends events to a JSONL file, a line each, so that a reader sees only whole events."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def emit(self, event: Mapping[str, object]) -> None:
        """Append one event, in one write; a line that a killed process left unended is ended first."""
        fault_point("event")
        line = json.dumps(event).encode() + b"\n"
        with self._path.open("ab", buffering=0) as stream:
            stream.write(line if self._ends_whole() else b"\n" + line)

    def _ends_whole(self) -> bool:
        with self._path.open("rb") as stream:
            return stream.seek(0, os.SEEK_END) == 0 or (stream.seek(-1, os.SEEK_END) >= 0 and stream.read() == b"\n")


def read_event(line: str | bytes) -> dict[str, Any] | None:
    """The event of one line of a file of events, None for a line that was cut off."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


class NullReporter:
    """Drops every event."""

    def emit(self, event: Mapping[str, object]) -> None:
        """Do nothing."""
