"""Where a stage computes: only one module asks CUDA, ranks have a GPU each, and no GPU is used unasked."""

import ast
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.distributed.distributed_c10d import Store

import components
from components.core.base.errors import InputError, RecipeError
from components.core.runtime import devices
from components.core.runtime.devices import backend_of, device_of, join_process_group
from components.core.runtime.placement import Placement

SOURCES = sorted(Path(components.__path__[0]).rglob("*.py"))
GPU_LIBRARIES = ("cuda", "accelerator", "xpu", "mps")


def test_each_local_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_has_gpu", lambda: True)
    placement = Placement(processes=4, gpus=4)
    found = []
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(device_of(placement))

    assert found == [torch.device("cuda", rank) for rank in range(4)]
    monkeypatch.delenv("LOCAL_RANK")
    assert device_of(Placement(gpus=2)) == torch.device("cuda", 0)


def test_without_gpus_in_the_placement_a_machine_with_gpus_computes_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_has_gpu", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")

    assert device_of(Placement(processes=2)) == torch.device("cpu")
    assert backend_of(torch.device("cpu")) == "gloo"
    assert backend_of(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"


def test_a_gpu_that_is_not_there_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_has_gpu", lambda: False)
    with pytest.raises(InputError, match=r"placement.gpus is 2, and PyTorch finds no GPU"):
        device_of(Placement(gpus=2))


def test_what_computes_on_the_cpu_cannot_offload() -> None:
    with pytest.raises(InputError, match=r"placement.offload .* placement.gpus is 0"):
        device_of(Placement(offload=True))


def test_a_rank_selects_its_device_before_it_joins_the_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[object] = []
    monkeypatch.setattr(devices, "_has_gpu", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: calls.append(backend))
    join_process_group(Placement(processes=4, gpus=4), cast("Store", None), rank=3, world_size=4)

    assert calls == [torch.device("cuda", 3), "cpu:gloo,cuda:nccl"]


def test_processes_without_a_gpu_for_each_are_refused() -> None:
    with pytest.raises(RecipeError, match="processes=4 need a GPU each, and gpus=2"):
        Placement.parse({"processes": 4, "gpus": 2})
    assert Placement(processes=4, gpus=0).gpus == 0


def test_only_one_module_asks_for_gpus() -> None:
    """Also a device by the name "cuda" counts, and `fully_shard` without a mesh, which chooses a GPU by itself."""
    found = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = [ast.unparse(node) for node in ast.walk(tree) if _asks_for_gpus(node)]
        if used:
            found[path.relative_to(SOURCES[0].parent).as_posix()] = used

    assert list(found) == ["core/runtime/devices.py"], found


def _asks_for_gpus(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in GPU_LIBRARIES and isinstance(node.value, ast.Name) and node.value.id == "torch"
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.startswith("cuda")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fully_shard":
        return "mesh" not in {keyword.arg for keyword in node.keywords}
    return False
