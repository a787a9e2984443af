"""Refused inputs: what a cluster must not compute again when it retries a stage."""

import contextlib
from collections.abc import Iterator

from components.core.base.errors import InputError, StoreError, TesseraError, parse_error
from components.core.store.store import Store


@contextlib.contextmanager
def answer_retries(store: Store, path: str, retries: int) -> Iterator[None]:
    """Run the block, and raise the `InputError` that it raised to the next `retries` starts without running it.

    Kubeflow Pipelines retries a container after any failure, and has no option to leave out an exit code. The document
    counts the retries down: the start after the last one is made by a user who has mended something, so it runs the
    block. A `StoreError` is not recorded, because the store may answer at the next attempt.

    Args:
        store: takes the document of the refusal.
        path: the document's place; it names the run, the label and the stage key.
        retries: how often this command is started again after a failure; 0 records nothing and reads nothing.

    Raises:
        InputError: the block raised it, now or in an earlier attempt.
    """
    refusal = store.read_document_or_none(path) if retries else None
    if refusal is not None and refusal["retries"] > 0:
        store.put_document(path, refusal | {"retries": refusal["retries"] - 1})
        raise parse_error(refusal["error"]) or InputError(refusal["error"])
    try:
        yield
    except InputError as error:
        if retries and not isinstance(error, StoreError):
            with contextlib.suppress(TesseraError, OSError):  # the refusal is what the user should read
                store.put_document(path, {"error": f"{type(error).__name__}: {error}", "retries": retries})
        raise
