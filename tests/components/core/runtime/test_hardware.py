"""Names of processors: the same in each run, with their number, and asked without importing torch."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.core.runtime import hardware


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    for found in (hardware.cpu_name, hardware.gpu_names):
        found.cache_clear()
    yield
    for found in (hardware.cpu_name, hardware.gpu_names):
        found.cache_clear()


def with_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_are_named_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_tool(tmp_path, monkeypatch, 'echo "NVIDIA H100 80GB HBM3"; echo "NVIDIA H100 80GB HBM3"')
    monkeypatch.setattr(hardware, "vllm_uses_gpu", lambda: True)

    assert hardware.timing_device() == "NVIDIA H100 80GB HBM3, 2 GPUs"


def test_a_driver_that_does_not_answer_leaves_the_gpu_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_tool(tmp_path, monkeypatch, "echo no driver; exit 9")
    assert hardware.gpu_names() == "unknown GPU"
    hardware.gpu_names.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert hardware.gpu_names() == "unknown GPU"


def test_vllm_for_cpus_is_timed_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor: 1\n")
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "vllm_uses_gpu", lambda: False)

    assert hardware.timing_device() == f"Some CPU @ 2 GHz, {os.cpu_count()} CPUs"


def test_the_key_of_a_plan_needs_no_torch() -> None:
    code = "import sys, components.core.runtime.runner as r; r.timing_device(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "False"


def test_the_gpus_of_a_process_are_those_that_are_visible_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tool(tmp_path, monkeypatch, '[ "$1" = --query-gpu=index ] && printf "0\\n1\\n"')
    monkeypatch.delenv(hardware.VISIBLE_GPUS, raising=False)
    assert hardware.visible_gpus() == ["0", "1"]
    monkeypatch.setenv(hardware.VISIBLE_GPUS, "3, GPU-a")
    assert hardware.visible_gpus() == ["3", "GPU-a"]
    monkeypatch.setenv(hardware.VISIBLE_GPUS, "")
    assert hardware.visible_gpus() == []
    monkeypatch.delenv(hardware.VISIBLE_GPUS)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert hardware.visible_gpus() == []
