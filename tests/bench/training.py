"""Our training loop beside `transformers.Trainer`: `python -m tests.bench.training OUT`.

Both train the same Llama on the same rows with fused AdamW in float32, on one thread and in turns of a few steps, each
in a process of its own that is started as its users start it: ours with the allocator's settings that `tessera run`
gives a stage. Seconds are those of the processor, so that other programs matter little; a ratio is taken in each turn.
"""

import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from components.core.model.checkpoint import model_config
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.runtime.stage_command import ALLOCATOR
from components.core.text.example import DocumentList, Example
from components.core.text.packing import PackedStream
from components.core.training.loop import train
from components.core.training.losses import next_token_loss
from components.core.training.train_config import TrainConfig
from tests.bench.environment import environment
from tests.bench.rows import Row, tell, write_rows

ACCELERATE = "accelerate==1.15.0"
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", ATTENTION, f"{ATTENTION}_backward")
"""PyTorch's functions for matrix products and attention, as a profile names them."""
NAMES = {"ours": "", "ours_not_compiled": ", not compiled", "products_alone": ", matrix products and attention alone"}
"""What the rows of each side are called, after the size."""


class Size(NamedTuple):
    """A model to train, and how long."""

    name: str
    shape: dict[str, Any]
    seq_len: int
    batch_size: int
    steps: int
    """Of a turn; the first one is not timed."""
    rounds: int


SMALL = {"hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 4}
LARGE = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SIZES = (
    Size("2 M parameters", {**SMALL, "intermediate_size": 384, "vocab_size": 512}, 128, 16, 9, 7),
    Size(
        "135 M parameters",
        {**LARGE, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
        256,
        4,
        3,
        3,
    ),
)


class StepTimes:
    """Reports of our loop, as the times at which its steps ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def emit(self, event: Mapping[str, object]) -> None:
        """Take the time of a step."""
        if event["type"] == "progress":
            self.ends.append(time.process_time())


def ours(size: Size, rows: list[list[int]], compile: bool = True) -> float:
    """Tokens per processor second of our loop, as it runs long enough to compile its layers."""
    torch.manual_seed(0)
    model = TesseraForCausalLM(model_config(LlamaConfig(**size.shape).to_dict()))
    stream = PackedStream(DocumentList([Example(row, [True] * size.seq_len) for row in rows]), size.seq_len, seed=0)
    config = TrainConfig(
        num_steps=size.steps,
        global_batch_size=size.batch_size,
        micro_batch_size=size.batch_size,
        seq_len=size.seq_len,
        compile=compile,
    )
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        context = StageContext(times, Resume(Path(folder) / "resume"), Path(folder), Placement(threads=1))
        train(model, stream, next_token_loss, config, context)
    return _tokens_per_s(size, times.ends)


def ours_not_compiled(size: Size, rows: list[list[int]]) -> float:
    """Tokens per processor second of our loop in a short run."""
    return ours(size, rows, compile=False)


def hugging_face(size: Size, rows: list[list[int]], profiler: profile | None = None) -> float:
    """Tokens per processor second of `transformers.Trainer`; the profiler watches all steps after the first."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Times(TrainerCallback):
        """Takes the time of each step."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Take it."""
            ends.append(time.process_time())
            if profiler is not None and len(ends) in (1, size.steps):
                (profiler.start if len(ends) == 1 else profiler.stop)()

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size.batch_size,
            max_steps=size.steps,
            learning_rate=1e-3,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(LlamaForCausalLM(LlamaConfig(**size.shape)), arguments, train_dataset=data, callbacks=[Times()]).train()
    return _tokens_per_s(size, ends)


def products_alone(size: Size, rows: list[list[int]]) -> float:
    """Tokens per processor second of `transformers.Trainer` if only matrix products and attention took time.

    Both sides compute these with the same functions of PyTorch, so no loop is faster than this.
    """
    profiler = profile(activities=[ProfilerActivity.CPU])
    hugging_face(size, rows, profiler)
    times: dict[str, float] = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    seconds = sum(times.get(name, 0.0) for name in PRODUCTS) / 1e6
    return size.batch_size * size.seq_len * (size.steps - 1) / seconds


SIDES: dict[str, Callable[[Size, list[list[int]]], float]] = {
    side.__name__: side for side in (ours, ours_not_compiled, products_alone, hugging_face)
}


def measure(index: int) -> list[Row]:
    """All sides of a size in turns: the medians, and the median of the ratios."""
    size = SIZES[index]
    found: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(size.rounds):
        for name in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(turn(name, index))
        speeds = ", ".join(f"{name} {values[-1]:.0f}" for name, values in found.items())
        tell(f"{size.name}, round {number + 1}, tokens/s: {speeds}")
    theirs = found.pop("hugging_face")
    return [
        Row(
            f"training, {size.name}{NAMES[name]}",
            statistics.median(speeds),
            "tokens/s",
            f"transformers.Trainer, tokens/s: {statistics.median(theirs):.0f}",
            statistics.median(a / b for a, b in zip(speeds, theirs, strict=True)),
        )
        for name, speeds in found.items()
    ]


def turn(name: str, index: int) -> float:
    """Tokens/s of a side, in a process that is started as its users start it."""
    settings = ALLOCATOR if name.startswith("ours") else {}
    command = [sys.executable, "-m", "tests.bench.training", name, str(index)]
    done = subprocess.run(command, env={**settings, **os.environ}, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def take_turn(name: str, size: Size) -> None:
    """Print the tokens/s of a side on random rows, as the last line."""
    torch.set_num_threads(1)
    vocabulary, count = size.shape["vocab_size"], size.batch_size * size.steps
    rows = torch.randint(vocabulary, (count, size.seq_len), generator=torch.Generator().manual_seed(0)).tolist()
    print(SIDES[name](size, rows))  # noqa: T201


def _tokens_per_s(size: Size, ends: list[float]) -> float:
    """Of the median step after the first."""
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return size.batch_size * size.seq_len / statistics.median(steps)


def main() -> None:
    """Measure all sizes, write the rows.

    Transformers looks for accelerate when it is imported, so the program starts itself again with it in its path.
    """
    if importlib.util.find_spec("accelerate") is None:
        python = environment("training", ACCELERATE)  # all else that the Trainer imports, Tessera has too
        packages = next((python.parents[1] / "lib").glob("python*/site-packages"))
        path = os.pathsep.join([os.environ.get("PYTHONPATH", "."), str(packages)])
        command = [sys.executable, "-m", "tests.bench.training", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode)
    if sys.argv[1] in SIDES:
        take_turn(sys.argv[1], SIZES[int(sys.argv[2])])
    else:
        write_rows([row for index in range(len(SIZES)) for row in measure(index)], Path(sys.argv[1]))


if __name__ == "__main__":
    main()
