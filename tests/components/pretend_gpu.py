"""A GPU that is not there: tensors on it are tensors of the CPU with a label, and the labels of two devices never meet.

Fake tensors of PyTorch have no values, so code that reads a value (a mask, a loss) cannot run on them. Here the values
are real. Each storage has the label of its device: `to(device)` copies and labels, what is computed from labelled
tensors is labelled, and an operation that would mix devices raises the error that CUDA would raise. Results can be
compared with those of the CPU, to the bit.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from components.core.model import attention
from components.core.runtime import devices

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COPIES = ("aten::copy_", "aten::set_", "aten::_to_copy", "aten::detach")
"""Operations that may have tensors of two devices."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
"""Operations that take nearly all the time of a model."""


class Labels:
    """The storages on the pretended GPU.

    A storage that PyTorch's own code makes within an operation has no label yet: it gets that of the tensors it meets.
    """

    def __init__(self) -> None:
        self._on_gpu: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again
        self._undecided: dict[int, StorageWeakRef] = {}

    def put(self, tensor: Tensor) -> None:
        """Label a tensor as on the GPU."""
        if not tensor.is_meta:
            self._on_gpu[_address(tensor)] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        return not tensor.is_meta and _address(tensor) in self._on_gpu

    def leave_open(self, tensor: Tensor) -> None:
        """Note that a tensor has no label yet."""
        if not tensor.is_meta:
            self._undecided[_address(tensor)] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def decide(self, tensor: Tensor) -> None:
        """Note that a tensor is where it is, because it was returned to the caller."""
        if not tensor.is_meta:
            self._undecided.pop(_address(tensor), None)

    def is_open(self, tensor: Tensor) -> bool:
        """Whether a tensor has no label yet."""
        return not tensor.is_meta and _address(tensor) in self._undecided


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_meta]


class Operations(TorchDispatchMode):
    """Labels results, and refuses operations on two devices.

    Attributes:
        products: number of matrix products on each device.
    """

    def __init__(self, labels: Labels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = labels
        self.products = {"cpu": 0, "cuda": 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            tensors = _tensors((args, kwargs))
            name = func._schema.name
            if any(map(self.labels.has, tensors)) and name not in COPIES:
                for tensor in filter(self.labels.is_open, tensors):
                    self.labels.put(tensor)
            on_gpu = [self.labels.has(tensor) for tensor in tensors]
            met = {gpu for gpu, tensor in zip(on_gpu, tensors, strict=True) if tensor.dim() or gpu}
            if len(met) == 2 and name not in COPIES:
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cpu and cuda:0")
            if name in PRODUCTS and tensors:
                self.products["cuda" if on_gpu[0] else "cpu"] += 1
            before = set(map(_address, tensors))
            result = func(*args, **(kwargs or {}))
            for made in _tensors(result):
                if _address(made) not in before and any(on_gpu):
                    self.labels.put(made)
                elif not tensors:
                    self.labels.leave_open(made)
            return result


class Devices(TorchFunctionMode):
    """What Python sees of devices: `tensor.device`, `to`, `cpu`, and the argument `device` of functions."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = labels

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if self.labels.has(args[0]) else func(*args)
        if func == torch.Tensor.numpy and self.labels.has(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._moved(func, args, kwargs)
        to_gpu = _is_gpu(kwargs.get("device"))
        result = func(*args, **(kwargs | {"device": CPU} if to_gpu else kwargs))
        for made in _tensors(result):
            self.labels.decide(made)
            if to_gpu or (func == torch.Tensor.__deepcopy__ and self.labels.has(args[0])):
                self.labels.put(made)
        return result

    def _moved(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What `to` or `cpu` returns: a copy where the device changes."""
        source: Tensor = args[0]
        named = [at for at, value in enumerate(args) if at and isinstance(value, (str, torch.device))]
        wanted = CPU if func == torch.Tensor.cpu else kwargs.get("device", args[named[0]] if named else None)
        was_gpu = self.labels.has(source)
        if wanted is None or torch.device(wanted).type == "meta":
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        if "device" in kwargs:
            kwargs["device"] = CPU
        moved: Tensor = func(*(CPU if at in named else value for at, value in enumerate(args)), **kwargs)
        if source.is_meta or was_gpu == _is_gpu(wanted):
            return moved
        with _disable_current_modes():  # a result without a label
            fresh = moved.detach().clone()
        if _is_gpu(wanted):
            self.labels.put(fresh)
        return fresh


def _is_gpu(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"  # type: ignore[call-overload,no-any-return]


GPUS = [pytest.param(True, id="pretended"), pytest.param(False, id="real", marks=pytest.mark.gpu)]
"""Values of a test's parameter `pretended`."""


H100_BYTES = 80 << 30


@contextmanager
def computes_on_gpu(pretended: bool, memory_bytes: int = H100_BYTES) -> Iterator[None]:
    """Check that what runs in the block computes on the GPU: on the pretended one alone, or on the real one at all.

    Either is said to have so much memory.
    """
    if pretended:
        with pretend_gpu(memory_bytes) as operations:
            yield
        assert operations.products["cpu"] == 0
        assert operations.products["cuda"] > 0
        return
    torch.cuda.reset_peak_memory_stats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_gpu_memory_bytes", lambda device: memory_bytes)
        yield
    assert torch.cuda.max_memory_allocated() > 0


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], pretended: bool) -> None:
    """Check tensors against those of the CPU: the same bits, or as near as another device's kernels come."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if pretended:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, atol=1e-2, rtol=1e-2)


def _attend_by_pairs(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, grouped: bool) -> Tensor:
    """What FlexAttention computes, with the kernel of the CPU: its own is for a real GPU."""
    batch, position = (torch.arange(query.shape[axis], device=query.device) for axis in (0, 2))
    pairs = mask.mask_mod(batch[:, None, None, None], position[0], position[:, None], position)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=pairs, enable_gqa=grouped)


@contextmanager
def pretend_gpu(memory_bytes: int = H100_BYTES) -> Iterator[Operations]:
    """A process that has a GPU with so much memory; yields the count of matrix products on each device."""
    labels = Labels()
    with pytest.MonkeyPatch.context() as patch, Operations(labels) as operations, Devices(labels):
        patch.setattr(devices, "_has_gpu", lambda: True)
        patch.setattr(devices, "_gpu_memory_bytes", lambda device: memory_bytes)
        patch.setattr(devices, "_gpu_name", lambda device: "NVIDIA H100 80GB HBM3")
        patch.setattr(attention, "attend_by_blocks", _attend_by_pairs)
        yield operations
