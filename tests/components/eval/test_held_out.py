"""The loss on held-out text is the same however little memory the model may take, and on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest

from components.core.runtime.context import StageContext
from components.core.runtime.placement import Placement
from components.eval.config import HeldOutText
from components.eval.held_out import held_out_loss
from tests.components.conftest import Recorder
from tests.components.pretend_gpu import GPUS, computes_on_gpu
from tests.components.test_reported_metrics import model_folder

CONFIG = HeldOutText(seq_len=64, batch_size=1, num_batches=2)


@pytest.mark.parametrize("pretended", GPUS)
def test_a_model_larger_than_its_device_is_read_layer_by_layer_to_the_same_loss(
    tmp_path: Path,
    tokenizer_folder: Path,
    sums: Path,
    recorded_context: StageContext,
    recorder: Recorder,
    pretended: bool,
) -> None:
    folder = model_folder(tmp_path / "model", tokenizer_folder, 0)
    whole = held_out_loss("sft", folder, sums, CONFIG, recorded_context)
    assert recorder.notes == []
    small = replace(recorded_context, placement=Placement(threads=1, memory_gib=1e-6))
    assert held_out_loss("sft", folder, sums, CONFIG, small) == whole
    with computes_on_gpu(pretended, memory_bytes=1000):
        on_gpu = replace(recorded_context, placement=Placement(threads=1, gpus=1))
        assert held_out_loss("sft", folder, sums, CONFIG, on_gpu) == pytest.approx(whole, rel=0 if pretended else 1e-3)
    assert [note.split(" takes ")[0] for note in recorder.notes] == ["the model sft"] * 2
