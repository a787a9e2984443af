"""A GRPO step of ours beside one of TRL's `GRPOTrainer`: `python -m tests.bench.grpo OUT [MODEL PROBLEMS]`.

A step samples answers to the same prompts with vLLM, scores them with the same function, takes two optimizer steps,
each on half of the answers, and gives vLLM the new weights. The sides are processes of one thread, which take turns.
Seconds are those of the processor, so that other programs matter little. The model is a folder of a dense Llama, by
default a tiny one in float32, in which every processor is fast; with it TRL's own way to generate is measured too.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from components.core.model.inspection import read_architecture
from tests.bench.environment import run_beside
from tests.bench.real_model import write_small
from tests.bench.rows import Row, in_turn, write_rows

TRL = ("trl==1.16.0", "accelerate==1.15.0")
PROMPTS = 8
"""Problems of a step."""
ROUNDS, LARGE_ROUNDS = 9, 3
LARGE_PARAMETERS = 50_000_000
"""From here on a model is measured in fewer rounds, and without TRL's own generation."""


class Side:
    """A process that takes a step each time it is asked."""

    def __init__(self, name: str, folder: Path, prompts: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.grpo_sides", name, str(folder), str(prompts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._name = name

    def step(self) -> float:
        """Take a step; returns its processor seconds.

        Raises:
            SystemExit: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the side {self._name!r} ended with {self._process.wait()}; what it said stands above")
        return float(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def measure(model: Path, problems: Path, folder: Path) -> list[Row]:
    """Our step, and those of TRL: medians, and their ratios.

    Args:
        model: a dense Llama with a chat template.
        problems: JSON Lines with a `question` each.
        folder: takes the prompts.
    """
    large = read_architecture(model).parameters > LARGE_PARAMETERS
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(rendered(model, problems)), encoding="utf-8")
    names = ("ours", "trl") if large else ("ours", "trl", "trl-generate")
    with ExitStack() as processes:
        sides = {name: processes.enter_context(Side(name, model, prompts)) for name in names}
        turns: dict[str, Callable[[], float]] = {name: side.step for name, side in sides.items()}
        for turn in turns.values():
            turn()  # the first step loads, compiles, and fills caches
        found = in_turn(turns, LARGE_ROUNDS if large else ROUNDS)
    size = f"{read_architecture(model).parameters / 1e6:.0f} M parameters"
    others = {"trl": "TRL with vLLM", "trl-generate": "TRL, generation by transformers"}
    return [
        Row(
            f"GRPO step, {size}",
            found["ours"],
            "s",
            f"{others[name]}, s: {found[name]:.2f}",
            found[name] / found["ours"],
        )
        for name in names[1:]
    ]


def rendered(model: Path, problems: Path) -> list[str]:
    """Prompts of the first problems, as the model's chat template writes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    questions = [json.loads(line)["question"] for line in problems.read_text(encoding="utf-8").splitlines()[:PROMPTS]]
    return [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
        )
        for question in questions
    ]


def write_float32(model: Path, out: Path) -> None:
    """Write a model with its tokenizer in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype="float32").save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def main() -> None:
    """Measure, and write the rows; TRL comes from an environment of its own."""
    if importlib.util.find_spec("trl") is None:
        run_beside("trl", TRL, "tests.bench.grpo", *sys.argv[1:])
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if sys.argv[2:]:
            model, problems = map(Path, sys.argv[2:])
        else:
            write_small(folder)
            model, problems = folder / "model", folder / "data" / "problems.jsonl"
            write_float32(model, model)
        write_rows(measure(model, problems, folder), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
