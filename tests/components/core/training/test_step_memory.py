"""Memory in closed form is that of the tensors of real optimizer steps, within a tenth."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from components.core.model.architecture import Architecture
from components.core.model.checkpoint import model_config
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.placement import Placement
from components.core.text.packing import Batch
from components.core.training import loop, step_memory
from components.core.training.losses import LossFunction, distillation_loss, next_token_loss, paired_layers
from components.core.training.step_memory import Step
from components.core.training.train_config import ComputeDtype, HiddenStateLoss, TrainConfig
from tests.components.core.training.tensor_memory import peak_bytes, state_of

TOLERANCE = 0.10
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}
DEEP: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "vocab_size": 256}
HEADS = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


def new_model(sizes: dict[str, Any]) -> TesseraForCausalLM:
    torch.manual_seed(0)
    return TesseraForCausalLM(model_config({**HEADS, **sizes, "max_position_embeddings": 512}))


def packed(rows: int, seq_len: int) -> Batch:
    """Rows of two documents."""
    ids = torch.randint(0, 256, (rows, seq_len))
    segments = (torch.arange(seq_len) // (seq_len // 2) + 1).expand(rows, -1)
    return Batch(ids, ids, torch.arange(seq_len).expand(rows, -1), segments)


def measured(
    sizes: dict[str, Any],
    config: TrainConfig,
    teacher: TesseraForCausalLM | None,
    compared: HiddenStateLoss | None = "cosine",
) -> int:
    """Bytes of all tensors at the peak of the second step."""
    model = new_model(sizes)
    loss: LossFunction[Batch] = next_token_loss
    if teacher is not None:
        loss = distillation_loss(teacher, paired_layers(teacher, model), compared)
    step = loop.prepare(model, loss, config, Placement())
    rows = packed(config.global_batch_size, config.seq_len)
    size = config.micro_batch_size

    def take_step() -> None:
        parts = (rows.rows(start, start + size) for start in range(0, config.global_batch_size, size))
        step.run(parts, rows.num_targets, 1e-4)

    take_step()  # after it there are moments
    models = [model] if teacher is None else [model, teacher]
    weights = [parameter for each in models for parameter in each.parameters()]
    return peak_bytes(take_step, [*weights, *state_of(step.optimizer)])


SHORT = {"num_steps": 1, "seq_len": 128, "compile": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weights decide": (WIDE, {"global_batch_size": 1, "micro_batch_size": 1}),
    "activations decide": (DEEP, {"global_batch_size": 8, "micro_batch_size": 8}),
    "gradients are summed": (DEEP, {"global_batch_size": 8, "micro_batch_size": 4}),
    "bfloat16": (DEEP, {"global_batch_size": 8, "micro_batch_size": 8, "dtype": "bfloat16"}),
    "bfloat16, weights decide": (WIDE, {"global_batch_size": 2, "micro_batch_size": 1, "dtype": "bfloat16"}),
    "computed again": (DEEP, {"global_batch_size": 8, "micro_batch_size": 8, "activation_checkpointing": True}),
    "moments of 8 bits": (WIDE, {"global_batch_size": 1, "micro_batch_size": 1, "optimizer": "adamw_8bit"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_is_predicted(case: str) -> None:
    sizes, settings = CASES[case]
    config = TrainConfig(**SHORT, **settings)
    shape = Architecture.from_config({**HEADS, **sizes})
    predicted = step_memory.step_memory(shape, Step.of(config, 1, "float32"))
    assert predicted.total == pytest.approx(measured(sizes, config, None), rel=TOLERANCE)


@pytest.mark.parametrize("compared", ["cosine", "mse", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_with_a_teacher(dtype: ComputeDtype, compared: HiddenStateLoss | None) -> None:
    config = TrainConfig(**SHORT, global_batch_size=8, micro_batch_size=4, dtype=dtype)
    teacher = new_model(WIDE | {"num_hidden_layers": 8}).requires_grad_(False)
    student = WIDE | {"num_hidden_layers": 8, "intermediate_size": 256}
    shape = Architecture.from_config({**HEADS, **student})
    parent = Architecture.from_config({**HEADS, **WIDE, "num_hidden_layers": 8})
    step = Step.of(config, 1, "float32").distilled_from(parent, "float32", matches_states=compared is not None)
    predicted = step_memory.step_memory(shape, step)
    assert predicted.total == pytest.approx(measured(student, config, teacher, compared), rel=TOLERANCE)


def test_on_a_gpu_there_is_no_mask_of_all_pairs() -> None:
    shape = Architecture.from_config({**HEADS, **DEEP, "hidden_size": 128})
    config = TrainConfig(num_steps=1, seq_len=4096, global_batch_size=2, micro_batch_size=2)
    for stored, size in (("float32", 4), ("bfloat16", 2)):
        cpu, gpu = (
            step_memory.step_memory(shape, Step.of(config, 1, stored, on_gpu=on_gpu)) for on_gpu in (False, True)
        )
        of_the_mask = 2 * 4096 * 4096 * (1 + size * len(shape.blocks))  # once as truth values, in each layer as numbers
        assert cpu.total - gpu.total == of_the_mask


SHARDED = """
import json, sys, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from components.core.training import loop
from components.core.training.losses import next_token_loss
from components.core.runtime.placement import Placement
from components.core.training.train_config import TrainConfig
from tests.components.core.training.tensor_memory import peak_bytes, state_of
from tests.components.core.training.test_step_memory import new_model, packed
ranks = int(sys.argv[1])
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
for sizes, settings, memory_gib in json.loads(sys.argv[2]):
    config, model = TrainConfig(**settings), new_model(sizes)
    step = loop.prepare(model, next_token_loss, config, Placement(memory_gib=memory_gib))
    rows = packed(config.micro_batch_size, config.seq_len)
    parts = [rows] * (config.global_batch_size // config.micro_batch_size // ranks)
    take_step = lambda: step.run(parts, rows.num_targets, 1e-4)
    take_step()
    print(peak_bytes(take_step, [*model.parameters(), *state_of(step.optimizer)]))
"""


LARGE = {"vocab_size": 16384}
TIED = {**LARGE, "tie_word_embeddings": True}


ON_FOUR = [(8, 1.0, {}), (16, 0.01, {}), (16, 1.0, {}), (8, 1.0, LARGE), (8, 1.0, TIED)]
"""Rows of a batch, memory of a rank in GiB, and what differs in the model."""


def sizes_and_settings(rows: int, vocabulary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    sizes = {**WIDE, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, **vocabulary}
    return sizes, {**SHORT, "global_batch_size": rows, "micro_batch_size": 2, "seq_len": 64}


@pytest.fixture(scope="module")
def peaks_on_four() -> list[int]:
    """Bytes of the tensors of one rank of four in each case, all in one process.

    Collective operations of its process group do nothing, so it shows the tensors of one rank.
    """
    cases = [(*sizes_and_settings(rows, vocabulary), memory_gib) for rows, memory_gib, vocabulary in ON_FOUR]
    command = [sys.executable, "-c", SHARDED, "4", json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[4])
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(peak) for peak in done.stdout.split()]


@pytest.mark.parametrize("case", range(len(ON_FOUR)))
def test_a_rank_of_four_takes_what_is_predicted(case: int, peaks_on_four: list[int]) -> None:
    rows, memory_gib, vocabulary = ON_FOUR[case]
    sizes, settings = sizes_and_settings(rows, vocabulary)
    shape = Architecture.from_config({**HEADS, **sizes})
    predicted = step_memory.step_memory(shape, Step.of(TrainConfig(**settings), 4, "float32", int(memory_gib * 2**30)))
    assert predicted.total == pytest.approx(peaks_on_four[case], rel=TOLERANCE)


VOCABULARY, HIDDEN, TOKENS = 32768, 64, 1024
LOSS = """
import sys, torch
from pathlib import Path
from torch import nn
from components.core.training.losses import cross_entropy_sum
from tests.components.core.training.test_step_memory import HIDDEN, TOKENS, VOCABULARY

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])

def loss(tokens):
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[1] == "bfloat16"):
        cross_entropy_sum(hidden, torch.zeros(tokens, dtype=torch.long), head).backward()

torch.set_num_threads(1)
head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
loss(8)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
loss(TOKENS)
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_over_a_large_vocabulary_takes_a_chunk_of_logits_or_two(dtype: str) -> None:
    """Operators allocate within themselves, so here it is the memory of the process that counts."""
    command = [sys.executable, "-c", LOSS, dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[4])
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = {**DEEP, "hidden_size": HIDDEN, "vocab_size": VOCABULARY}
    step = Step(1, 1, TOKENS, dtype == "bfloat16")
    assert step.tokens * VOCABULARY == step_memory.CHUNK_LOGITS
    predicted = step_memory.loss_bytes(Architecture.from_config({**HEADS, **sizes}), step)
    assert int(done.stdout) == pytest.approx(predicted, rel=TOLERANCE)
