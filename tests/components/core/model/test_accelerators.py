"""Peaks of GPUs by the names that drivers give them."""

import pytest

from components.core.model.accelerators import DEVICES, peak_flops


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_data_sheet(name: str, known: str) -> None:
    assert peak_flops(name, "bfloat16") == DEVICES[known].flops["bfloat16"]
    assert peak_flops(name, "float32") == DEVICES[known].flops["float32"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GH200 480GB",
        "NVIDIA L40",
        "AMD Instinct MI300X",
    ],
)
def test_another_board_a_slice_and_another_gpu_have_none(name: str) -> None:
    assert peak_flops(name, "bfloat16") is None


def test_a_type_that_a_gpu_does_not_multiply_has_none() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float8") is None
