"""Errors of the command rather than of a stage."""

from components.core.errors import TesseraError


class RunStopped(TesseraError):
    """Ctrl-C or SIGTERM ended the work; what was saved is taken up by the same command."""

    exit_code = 130
