"""Errors that a user can act on.

TesseraError              exit code 1: the work failed
├── StageFailed           a stage stopped with an error of its own
│   └── ProcessKilled     a process of a stage was killed, most often because memory ran out
├── CorruptArtifact       bytes in the store differ from their digest
└── InputError            exit code 2: wrong use or wrong input; nothing was written
    ├── RecipeError       a key, a value, or a combination of them
    ├── CheckpointError   a model folder that cannot or must not be read
    ├── DataError         malformed rows, with their line numbers
    ├── InfeasibleBudget  limits that no choice of blocks meets
    ├── StoreError        store unreachable, wrong credentials, no space
    ├── ClusterError      cluster unreachable, no rights there, or a part of it is missing
    ├── UntrustedArtifact an artifact that none of the trusted keys has signed
    └── MissingPackage    an optional part is not installed
"""

HINT = "\n  hint: "
"""Stands between the message of an error and its hint."""


class TesseraError(Exception):
    """The work failed; the message says what, with which values.

    Attributes:
        message: one sentence, with the values at hand.
        hint: the way out, or None.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """The message, and the hint on a line of its own."""
        return self.message if self.hint is None else f"{self.message}{HINT}{self.hint}"


class StageFailed(TesseraError):
    """A stage stopped with an error of its own."""


class ProcessKilled(StageFailed):
    """A process of a stage was killed; another attempt resumes, and may have the memory that this one lacked."""


class CorruptArtifact(TesseraError):
    """Bytes in the store differ from their digest."""


class InputError(TesseraError):
    """Wrong use or wrong input; nothing was written."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe key, a value, or a combination of them is wrong."""


class CheckpointError(InputError):
    """A model folder that cannot, or must not, be read."""


class DataError(InputError):
    """A data file has rows that cannot be used."""


class InfeasibleBudget(InputError):
    """No choice of blocks meets the limits."""


class StoreError(InputError):
    """The store cannot be used: unreachable, wrong credentials, no space."""


class ClusterError(InputError):
    """A cluster cannot be used: unreachable, no rights, a part of it is missing or too small."""


class UntrustedArtifact(InputError):
    """None of the trusted keys has signed an artifact."""


class MissingPackage(InputError):
    """A part that this command needs is not installed."""


class RunStopped(TesseraError):
    """Ctrl-C or SIGTERM ended the work; the same command continues from what was saved."""

    exit_code = 130


def parse_error(text: str) -> TesseraError | None:
    """The error behind the text `NAME: MESSAGE`, as torchrun writes it; None where it is no `TesseraError`."""
    name, _, sentences = text.partition(": ")
    message, _, hint = sentences.partition(HINT)
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, TesseraError):
        return kind(message, hint=hint or None)
    return None
