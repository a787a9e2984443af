"""Events that a stage reports while it works, and the JSONL file that they are appended to."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from components.core.base.fault_injection import fault_point


class Reporter(Protocol):
    """Receives the events of a stage in order."""

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
    """The event of one line of a file of events; None for a line that was cut off."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


class EventFile:
    """Reads a file of events in portions; a line that is still being written is left to the next one."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path, self._offset = path, offset

    def read(self, until: int = -1) -> Iterator[dict[str, Any]]:
        """The events that were appended since the last call; those before the position `until` where it is given."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n") or 0 <= until <= self._offset:
                    return
                self._offset += len(line)
                if (event := read_event(line)) is not None:
                    yield event


class NullReporter:
    """Drops every event."""

    def emit(self, event: Mapping[str, object]) -> None:
        """Do nothing."""


class _WarningNotes(logging.Handler):
    """Turns log warnings of packages that have no reporter, such as the store, into notes to the user."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Report one warning."""
        try:
            self._reporter.emit({"type": "note", "time": time.time(), "text": record.getMessage()})
        except OSError:  # a full disk must not fail the stage here
            self.handleError(record)


def forward_log_warnings(reporter: Reporter) -> None:
    """Report warnings of `tessera.*` loggers as notes of the stage that this process runs now.

    Without this, Python prints them to standard error.
    """
    logging.getLogger("tessera").handlers = [_WarningNotes(reporter)]
