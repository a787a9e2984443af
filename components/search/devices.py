"""Devices that costs can be predicted for: what their data sheets say. Light: no torch."""

from collections.abc import Mapping

from pydantic import Field

from components.core.base.config import Config
from components.core.serving.load_profile import Dtype


class Device(Config):
    """One accelerator or processor of the kind that a model is served on."""

    name: str
    """What it is called."""
    memory_bytes: int = Field(gt=0)
    """Memory."""
    bytes_per_s: float = Field(gt=0)
    """Peak bandwidth of that memory."""
    flops: Mapping[Dtype, float]
    """Peak floating-point operations a second of dense matrix products; what is not listed cannot be computed there."""
    link_bytes_per_s: float | None = Field(default=None, gt=0)
    """Peak bandwidth to the other devices that share a layer, one direction; None where it has no such link."""
    subblock_s: float = Field(default=20e-6, ge=0)
    """What starting the kernels of a sub-block, its norm and its residual take beside the work itself."""
    link_s: float = Field(default=15e-6, ge=0)
    """What an all-reduce takes beside moving its data."""
    step_s: float = Field(default=0.0, ge=0)
    """What the engine does between two steps."""
    source: str = ""
    """Where the figures are from."""


GIB, TERA, GIGA = 1 << 30, 1e12, 1e9

DEVICES = {
    device.name: device
    for device in (
        Device(
            name="A100",
            memory_bytes=80 * GIB,
            bytes_per_s=2.039 * TERA,
            flops={"float32": 156 * TERA, "bfloat16": 312 * TERA},
            link_bytes_per_s=300 * GIGA,
            source="NVIDIA A100 data sheet, 80GB SXM; float32 as TF32",
        ),
        Device(
            name="H100",
            memory_bytes=80 * GIB,
            bytes_per_s=3.35 * TERA,
            flops={"float32": 494.7 * TERA, "bfloat16": 989.4 * TERA, "float8": 1978.9 * TERA},
            link_bytes_per_s=450 * GIGA,
            source="NVIDIA H100 data sheet, SXM, without sparsity; float32 as TF32",
        ),
        Device(
            name="H200",
            memory_bytes=141 * 10**9,
            bytes_per_s=4.8 * TERA,
            flops={"float32": 494.7 * TERA, "bfloat16": 989.4 * TERA, "float8": 1978.9 * TERA},
            link_bytes_per_s=450 * GIGA,
            source="NVIDIA H200 data sheet, SXM, without sparsity; float32 as TF32",
        ),
        Device(
            name="B200",
            memory_bytes=180 * 10**9,
            bytes_per_s=8.0 * TERA,
            flops={"float32": 1100 * TERA, "bfloat16": 2250 * TERA, "float8": 4500 * TERA},
            link_bytes_per_s=900 * GIGA,
            source="NVIDIA DGX B200 data sheet, an eighth of it, without sparsity; float32 as TF32",
        ),
        Device(
            name="L40S",
            memory_bytes=48 * GIB,
            bytes_per_s=864 * GIGA,
            flops={"float32": 183 * TERA, "bfloat16": 362 * TERA, "float8": 733 * TERA},
            link_bytes_per_s=32 * GIGA,
            source="NVIDIA L40S data sheet, without sparsity; float32 as TF32; PCIe 4.0 in place of NVLink",
        ),
        Device(
            name="CPU",
            memory_bytes=16 * GIB,
            bytes_per_s=20 * GIGA,
            flops={"float32": 100 * GIGA, "bfloat16": 50 * GIGA},
            subblock_s=250e-6,
            step_s=800e-6,
            source="one thread of an AMD EPYC, measured with matrix products and vectors in torch; starts in vLLM",
        ),
    )
}


def device_of(device: str | Device) -> Device:
    """A device by its name; a profile of the user's own is one already."""
    return DEVICES[device] if isinstance(device, str) else device


def device_named(name: str) -> Device | None:
    """The device that a machine's own name for its accelerator stands for, such as `NVIDIA H100 80GB HBM3`."""
    return next((device for known, device in DEVICES.items() if known in name), None)
