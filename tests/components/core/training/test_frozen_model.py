"""A model is whole in memory up to half of it, and read a layer at a time above that: of the device that computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from components.core.model.layer_files import is_paged
from components.core.model.weight_index import weight_files
from components.core.runtime.context import StageContext
from components.core.runtime.placement import Placement
from components.core.training.frozen_model import load_frozen
from tests.components.conftest import Recorder
from tests.components.core import tiny_models
from tests.components.pretend_gpu import pretend_gpu


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.write(tiny_models.llama(0), tmp_path / "model")


def pages(folder: Path, context: StageContext, placement: Placement, processes: int = 1) -> bool:
    context = replace(context, placement=placement)
    model = load_frozen(folder, context, what="the parent", computes_in=torch.float32, processes=processes)
    assert not any(weight.requires_grad for weight in model.parameters())
    return is_paged(model.model.layers)


def test_a_cpu_has_the_memory_of_the_placement_and_each_process_its_share(
    folder: Path, recorded_context: StageContext, recorder: Recorder
) -> None:
    stored = sum(file.stat().st_size for file in weight_files(folder))
    enough = Placement(threads=1, memory_gib=2 * stored / 2**30)
    assert not pages(folder, recorded_context, enough)
    assert recorder.notes == []
    assert pages(folder, recorded_context, Placement(threads=1, memory_gib=(2 * stored - 2) / 2**30))
    (note,) = recorder.notes
    assert note.startswith("the parent takes ")
    assert note.endswith("GiB that memory_gib leaves: its layers are read one at a time")
    assert pages(folder, recorded_context, enough, processes=2)


def test_a_gpu_has_its_own_memory_and_not_that_of_its_node(
    folder: Path, recorded_context: StageContext, recorder: Recorder
) -> None:
    stored = sum(file.stat().st_size for file in weight_files(folder))
    with pretend_gpu(2 * stored):
        assert not pages(folder, recorded_context, Placement(threads=1, gpus=1, memory_gib=1e-6))
    with pretend_gpu(2 * stored - 1):
        assert pages(folder, recorded_context, Placement(threads=1, gpus=1, memory_gib=900))
        on_host = replace(recorded_context, placement=Placement(threads=1, gpus=1, memory_gib=900))
        cpu = torch.device("cpu")
        model = load_frozen(folder, on_host, what="the parent", computes_in=torch.float32, device=cpu)
        assert not is_paged(model.model.layers)
    (note,) = recorder.notes
    assert "GiB that its GPU has: its layers are read one at a time" in note
