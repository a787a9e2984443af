"""Devices that models are computed on, with the figures of their data sheets. Light: no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter

from components.core.base.config import Config
from components.core.base.yaml_text import read_yaml

Dtype = Literal["float32", "bfloat16", "float16", "float8"]
"""Type of matrix products."""


class Device(Config):
    """An accelerator or processor that a model can be served on."""

    name: str
    """Name, such as H100."""
    memory_bytes: int = Field(gt=0)
    """Size of its memory, bytes."""
    bytes_per_s: float = Field(gt=0)
    """Peak bandwidth of its memory."""
    flops: Mapping[Dtype, float]
    """Peak floating-point operations a second of dense matrix products; a dtype that is not listed is not supported."""
    link_bytes_per_s: float | None = Field(default=None, gt=0)
    """Peak bandwidth to the other devices that share a layer, one direction; None where it has no such link."""
    subblock_s: float = Field(default=20e-6, ge=0)
    """Overhead of launching the kernels of a sub-block, its norm and its residual, seconds."""
    link_s: float = Field(default=15e-6, ge=0)
    """Latency of an all-reduce, without the transfer of its data, seconds."""
    step_s: float = Field(default=0.0, ge=0)
    """Time of the engine between two steps, seconds."""
    source: str = ""
    """Source of the figures."""


DEVICES = {
    device.name: device
    for device in TypeAdapter(tuple[Device, ...]).validate_python(
        read_yaml(Path(__file__).with_name("accelerators.yaml").read_text(encoding="utf-8"), "accelerators.yaml")
    )
}
"""The devices of accelerators.yaml, by name."""
OTHER_FORMS = ("PCIE", "NVL", "MIG")
"""Words in the name of a GPU that is slower than its data sheet's SXM module: on another board, or a slice."""


def device_of(device: str | Device) -> Device:
    """The device of a name; a profile of the user's own is returned unchanged."""
    return DEVICES[device] if isinstance(device, str) else device


def device_named(name: str) -> Device | None:
    """The device in the name that a machine reports, such as `NVIDIA H100 80GB HBM3`."""
    return next((device for known, device in DEVICES.items() if known in name), None)


def peak_flops(name: str, dtype: Dtype) -> float | None:
    """Peak operations a second of a GPU; None where it is not known.

    Args:
        name: as its driver has it.
        dtype: type of the matrix products.
    """
    words = name.upper().replace("-", " ").split()
    if any(word in words for word in OTHER_FORMS):
        return None
    return next((device.flops.get(dtype) for known, device in DEVICES.items() if known in words), None)
