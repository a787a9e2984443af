"""Bytes of all tensors that are alive while some work is done."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts storages of tensors that are there before, and of those that operators return, until they are freed.

    Sharding keeps storages and makes them empty, so their sizes are read anew at each operator.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0
        for tensor in before:
            self._add(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        storages = [reference() for reference in self._alive.values()]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in storages if storage is not None))
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._alive.pop(key, None))


def peak_bytes(work: Callable[[], object], before: Iterable[Tensor]) -> int:
    """The most bytes of tensors at a time."""
    live = LiveTensors(before)
    with live:
        work()
    return live.peak


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Tensors of an optimizer's state."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
