"""How busy the GPUs are, by what a driver's tool prints."""

from pathlib import Path

import pytest

from components.core.runtime.monitoring.gpus import GpuUse, gpu_use


def driver_tool(folder: Path, script: str) -> str:
    """A folder with a tool of the name of NVIDIA's."""
    folder.mkdir()
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return str(folder)


def test_each_gpu_has_its_use_and_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = '[ "$1" = --query-gpu=index,utilization.gpu,memory.used ] && printf "0, 87, 1024\\n1, 0, 3\\n"'
    monkeypatch.setenv("PATH", driver_tool(tmp_path / "bin", script))
    assert gpu_use() == [GpuUse("0", 0.87, 2**30), GpuUse("1", 0.0, 3 * 2**20)]


@pytest.mark.parametrize("script", ["exit 9", "echo '0, [N/A], 1024'", "echo No devices were found"])
def test_a_tool_that_knows_no_use_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setenv("PATH", driver_tool(tmp_path / "bin", script))
    assert gpu_use() == []


def test_without_a_driver_there_are_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_use() == []


@pytest.mark.gpu
def test_the_driver_of_this_machine_answers() -> None:
    used = gpu_use()
    assert used
    assert all(0 <= gpu.utilization <= 1 and gpu.memory_bytes >= 0 for gpu in used)
