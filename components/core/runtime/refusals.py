"""Final errors: what a cluster must not compute again when it retries a stage."""

import contextlib
from collections.abc import Iterator

from components.core.base.errors import (
    ClusterError,
    InputError,
    ProcessKilled,
    StageFailed,
    StoreError,
    TesseraError,
    parse_error,
)
from components.core.store.store import Store


@contextlib.contextmanager
def answer_retries(store: Store, path: str, retries: int) -> Iterator[None]:
    """Run the block, and raise the final error that it raised to the next `retries` starts without running it.

    Kubeflow Pipelines retries a container after any failure, and has no option to leave out an exit code. A pod that
    is evicted, preempted or killed leaves no document, so its retry runs the block. The document counts the retries
    down: the start after the last one is made by a user who has mended something, so it runs the block too.

    Args:
        store: takes the document of the error.
        path: the document's place; it names the run, the label and the stage key.
        retries: how often this command is started again after a failure; 0 records nothing and reads nothing.

    Raises:
        TesseraError: the block raised it, now or in an earlier attempt.
    """
    refusal = store.read_document_or_none(path) if retries else None
    if refusal is not None and refusal["retries"] > 0:
        store.put_document(path, refusal | {"retries": refusal["retries"] - 1})
        raise parse_error(refusal["error"]) or StageFailed(refusal["error"])
    try:
        yield
    except TesseraError as error:
        if retries and is_final(error):
            with contextlib.suppress(TesseraError, OSError):  # the user should read the error itself
                store.put_document(path, {"error": f"{type(error).__name__}: {error}", "retries": retries})
        raise


def is_final(error: TesseraError) -> bool:
    """Whether another attempt would end alike: not where the store or the cluster may answer, or memory may suffice."""
    may_pass = StoreError | ClusterError | ProcessKilled
    return isinstance(error, InputError | StageFailed) and not isinstance(error, may_pass)
