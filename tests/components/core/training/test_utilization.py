"""Operations of a step against PyTorch's own count; shares of a step by hand."""

import time
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.core.model.architecture import Architecture
from components.core.runtime.context import StageContext
from components.core.text.example import DocumentList, Example
from components.core.text.packing import PackedStream
from components.core.training import loop
from components.core.training.loop import train
from components.core.training.losses import next_token_loss
from components.core.training.train_config import TrainConfig
from components.core.training.utilization import ModelFlops, StepMeter
from tests.components.conftest import Recorder
from tests.components.core import tiny_models

MILLION = ModelFlops(of_token=1_000_000, of_target=0, of_pair=0)


@pytest.mark.parametrize("shapes", [tiny_models.DIFFERENT, [(2, "linear"), ("linear", 50)]])
def test_operations_are_those_that_pytorch_counts(shapes: tiny_models.Shapes) -> None:
    """PyTorch counts all pairs of a row, also those that the causal mask hides."""
    model = tiny_models.heterogeneous(0, shapes)
    ids = torch.randint(0, tiny_models.VOCAB_SIZE, (2, 12))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    tokens = ids.numel()
    assert ModelFlops.of(Architecture.from_config(model.config.to_dict())).of_step(
        tokens, tokens, 2 * 12 * 12
    ) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the meter sees; it stands still until a test sets it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_shares_are_of_the_step_and_tokens_a_second_of_the_whole_attempt(clock: list[float]) -> None:
    meter = StepMeter(MILLION, peak=1e9)
    with meter.waiting():
        clock[0] += 1
    clock[0] += 3
    # a thousand tokens, of a million operations each, in 4 s, in which the devices could do four times as many
    assert meter.end_step(1000, 500, 0) == {"tokens_per_s": 250.0, "data_stall": 0.25, "mfu": 0.25}
    clock[0] += 6  # a checkpoint, which is of no step
    with meter.waiting():
        pass
    clock[0] += 2
    assert meter.end_step(1000, 500, 0) == {"tokens_per_s": 2000 / 12, "data_stall": 0.0, "mfu": 0.5}


def test_a_device_whose_peak_is_not_known_has_no_utilization(clock: list[float]) -> None:
    meter = StepMeter(MILLION, peak=None)
    with meter.waiting():
        clock[0] += 1
    assert meter.end_step(1000, 500, 0).keys() == {"tokens_per_s", "data_stall"}


@pytest.mark.parametrize("name", ["", "NVIDIA H100 80GB HBM3"])
def test_a_training_reports_its_utilization_where_the_peak_is_known(
    name: str, tmp_path: Path, recorded_context: StageContext, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "device_name", lambda device: name)
    documents = DocumentList([Example([2, 3, 4, 5], [True] * 4)] * 8)
    config = TrainConfig(num_steps=2, global_batch_size=2, micro_batch_size=2, seq_len=8)
    train(tiny_models.heterogeneous(0), PackedStream(documents, 8, seed=0), next_token_loss, config, recorded_context)
    assert len(recorder.curve("tokens_per_s")) == 2
    assert all(0 < stall < 1 for stall in recorder.curve("data_stall"))
    found = recorder.curve("mfu")
    assert len(found) == (2 if name else 0)
    assert all(0 < value < 1 for value in found)
