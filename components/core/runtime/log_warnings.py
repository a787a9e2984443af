"""Reports log warnings of packages that have no reporter, such as the store, as notes to the user."""

import logging
import time

from components.core.runtime.events import Reporter


class _Notes(logging.Handler):
    """Turns warnings into notes."""

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
    logging.getLogger("tessera").handlers = [_Notes(reporter)]
