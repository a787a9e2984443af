"""Memory of each rank in loading, training and saving a model: `python -m tests.bench.sharding OUT`.

Each phase is measured by the highest resident memory of a rank above what it had before it loaded the model. The ranks
share the machine's processors, so nothing is timed.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from components.core.model.checkpoint import model_config, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.runtime.events import NullReporter
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.runtime.torchrun import RANK_ALLOCATOR
from components.core.text.example import DocumentList, Example
from components.core.text.packing import PackedStream
from components.core.training.loop import train
from components.core.training.losses import next_token_loss
from components.core.training.sharding import load_student, load_teacher, save_trained
from components.core.training.train_config import TrainConfig
from tests.bench.rows import Row, write_rows

GIB = 2**30
RANKS = (2, 3)
LOADING_LIMIT, TRAINING_LIMIT = 1.3, 1.3
SEQ_LEN = 64


class Size(NamedTuple):
    """A model to measure."""

    name: str
    shape: dict[str, Any]


SIZES = (
    Size(
        "135 M, tied",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
    Size(
        "263 M",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "intermediate_size": 3072,
            "vocab_size": 32768,
        },
    ),
)
PHASES = ("loading", "loading a teacher", "training", "training with resume points", "saving")


def main() -> None:
    """Measure all sizes and numbers of ranks, write the rows."""
    if len(sys.argv) == 3:
        measure_rank(Path(sys.argv[1]), Path(sys.argv[2]))
        return
    rows: list[Row] = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            config = LlamaConfig(**size.shape, eos_token_id=0, bos_token_id=None)
            model = TesseraForCausalLM(model_config(config.to_dict()))
            parameters = model.num_parameters()
            layer_bytes = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
            (Path(folder) / "tokenizer").mkdir()
            save_model(model, Path(folder) / "model", tokenizer=None, dtype=torch.bfloat16)
            del model
            for ranks in RANKS:
                rows += measure(size.name, parameters, layer_bytes, ranks, Path(folder))
                write_rows(rows, Path(sys.argv[1]))


def measure(name: str, parameters: int, layer_bytes: int, ranks: int, folder: Path) -> list[Row]:
    """Run the ranks; the rows of the one that took most memory in each phase."""
    out = folder / f"ranks-{ranks}"
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**RANK_ALLOCATOR, **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    subprocess.run([*command, "-m", "tests.bench.sharding", str(folder), str(out)], env=environment, check=True)
    found = [json.loads(file.read_text()) for file in out.glob("rank-*.json")]
    part = 4 * parameters / ranks
    limits = {
        "loading": ("1.3 W/R and two layers", LOADING_LIMIT * part + 2 * layer_bytes),
        "loading a teacher": (
            "1.3 W/R and two layers, of a bfloat16 model",
            (LOADING_LIMIT * part + 2 * layer_bytes) / 2,
        ),
        "training": ("1.3 times weights, gradients and moments by R", TRAINING_LIMIT * 4 * part),
        "training with resume points": (
            "the same, with a copy of weights and moments",
            TRAINING_LIMIT * 4 * part + 3 * part,
        ),
        "saving": ("1.3 W/R and two layers", LOADING_LIMIT * part + 2 * layer_bytes),
    }
    rows = []
    for phase in PHASES:
        peak = max(rank[phase] for rank in found)
        what, limit = limits[phase]
        rows.append(
            Row(f"{name}, {ranks} ranks, {phase}", peak / GIB, "GiB", f"{what}: {limit / GIB:.2f} GiB", limit / peak)
        )
    return rows


def measure_rank(folder: Path, out: Path) -> None:
    """Measure one rank in each phase."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dist.barrier()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = TrainConfig(
        num_steps=2,
        global_batch_size=ranks,
        micro_batch_size=1,
        seq_len=SEQ_LEN,
        dtype="float32",
        resume_interval_s=1e9,
    )
    before, peaks = resident("VmRSS"), dict[str, int]()

    def highest(phase: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        made = work()
        peaks[phase] = resident("VmHWM") - before
        dist.barrier()
        return made

    def context(name: str) -> StageContext:
        scratch = out / name
        scratch.mkdir(exist_ok=True)
        return StageContext(NullReporter(), Resume(scratch / "resume"), scratch, Placement(threads=1), rank)

    teacher = highest("loading a teacher", lambda: load_teacher(folder / "model", context("teacher")))
    del teacher
    gc.collect()
    model = highest("loading", lambda: load_student(folder / "model", config, context("student")))
    vocabulary = model.config.vocab_size
    ids = torch.randint(1, vocabulary, (ranks * 2, SEQ_LEN), generator=torch.Generator().manual_seed(0)).tolist()
    stream = PackedStream(DocumentList([Example(row, [True] * SEQ_LEN) for row in ids]), SEQ_LEN, seed=0)
    highest("training", lambda: train(model, stream, next_token_loss, config, context("training")))
    often = config.model_copy(update={"resume_interval_s": 1e-9})
    highest("training with resume points", lambda: train(model, stream, next_token_loss, often, context("often")))
    dtype, tokenizer = torch.bfloat16, folder / "tokenizer"
    highest("saving", lambda: save_trained(model, out / "saved", tokenizer=tokenizer, dtype=dtype))
    (out / f"rank-{rank}.json").write_text(json.dumps(peaks))
    dist.destroy_process_group()


def resident(field: str) -> int:
    """Resident memory of this process, bytes: `VmRSS` now, or its peak `VmHWM`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main()
