"""Arrays that one process of a machine computes, and all others map."""

import fcntl
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrays = tuple[NDArray[np.int64], ...]


def stored_arrays(folder: Path | None, name: str, build: Callable[[], Arrays]) -> Arrays:
    """Arrays of a name; the first process that asks computes and stores them, and others wait and map them.

    Args:
        folder: where they are stored; None: in the memory of this process.
        name: says what they depend on.
        build: computes them.
    """
    if folder is None:
        return build()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            arrays = build()
            partial = Path(tempfile.mkdtemp(dir=folder))
            for number, array in enumerate(arrays):
                np.save(partial / f"{number}.npy", array)
            partial.rename(target)
    return tuple(np.load(path, mmap_mode="r") for path in sorted(target.glob("*.npy")))
