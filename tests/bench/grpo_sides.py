"""The sides of `grpo.py`: `python -m tests.bench.grpo_sides ours|trl|trl-generate MODEL PROMPTS`.

A side takes a step for each line of its standard input, and writes the processor seconds of the step.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from components.core.model.inspection import stored_dtype
from components.core.serving.settings import ENVIRONMENT

SAMPLES, MAX_TOKENS, UPDATES, MICRO_BATCH = 8, 96, 2, 16
"""Answers to a problem, their maximum length, optimizer steps of a step, answers that are computed at a time."""
LEARNING_RATE = 1e-6
VLLM_MEMORY = 0.1
"""Fraction of the machine's memory that TRL's vLLM may take."""


def score(text: str) -> float:
    """A reward that half of all answers earn, so that every group has a spread."""
    return float(len(text) % 2)


def ours(folder: Path, prompts: Sequence[str]) -> Callable[[], float]:
    """Our step, as the stage takes it; returns a function that takes one and gives its processor seconds."""
    from tokenizers import Tokenizer

    from components.core.model.checkpoint import load_model
    from components.core.serving.engine import Engine
    from components.core.text.tokenizer import eos_token_id
    from components.rl.config import RlConfig
    from components.rl.grpo import Learner
    from components.rl.rollout import Environment, Problem, Sampler

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    problems = [Problem(str(number), list(ids), "", "off") for number, ids in enumerate(encoded)]
    config = RlConfig(
        prompts_per_step=len(prompts),
        samples_per_prompt=SAMPLES,
        updates_per_step=UPDATES,
        micro_batch_size=MICRO_BATCH,
        max_tokens=MAX_TOKENS,
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        dtype=stored_dtype(folder),
    )
    policy = load_model(folder)
    learner = Learner(policy, config)
    engine = Engine(
        folder,
        max_model_len=MAX_TOKENS + max(map(len, encoded)),
        max_num_seqs=len(prompts) * SAMPLES,
    )
    environment = Environment(lambda answer, expected, verifier: score(answer))
    sampler = Sampler(engine, tokenizer, eos_token_id(folder), config, environment)
    version = 0

    def step() -> float:
        nonlocal version
        version += 1
        began = time.process_time()
        learner.learn(sampler.sample(problems, seed=version, samples=SAMPLES))
        engine.update_weights(policy.named_parameters(), version=version)
        return time.process_time() - began

    return step


def trl(folder: Path, prompts: Sequence[str], turns: "Turns", scratch: str, *, with_vllm: bool) -> None:
    """TRL's trainer, which takes a step each time `turns` lets it."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    half = len(prompts) * SAMPLES // UPDATES
    assert half % MICRO_BATCH == 0
    bfloat16 = stored_dtype(folder) == "bfloat16"
    vllm: dict[str, Any] = {
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": VLLM_MEMORY,
        "vllm_max_model_length": 512,
    }
    config = GRPOConfig(
        output_dir=scratch,
        use_cpu=True,
        bf16=bfloat16,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=half // MICRO_BATCH,
        generation_batch_size=UPDATES * half,
        num_generations=SAMPLES,
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=1_000_000,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": torch.float32},
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_vllm=with_vllm,
        **(vllm if with_vllm else {}),
    )

    class Steps(TrainerCallback):
        """Waits before a rollout, and reports after its last optimizer step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Wait."""
            if state.global_step % UPDATES == 0:
                turns.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Report."""
            if state.global_step % UPDATES == 0:
                turns.report()

    def rewards(completions: list[str], **_: Any) -> list[float]:
        """As ours: an answer that is in format earns 0.2 more."""
        return [score(text.strip()) + 0.2 * bool(text.strip()) for text in completions]

    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        callbacks=[Steps()],
    )
    if with_vllm:
        give_weights_anew(trainer)
    trainer.train()


def give_weights_anew(trainer: Any) -> None:
    """Let the trainer give vLLM its weights through vLLM's reload.

    TRL writes into the parameters of vLLM's layers, and on a CPU vLLM computes with packed copies of them.
    """
    generation = trainer.vllm_generation

    def sync_weights() -> None:
        weights = [(name, parameter.data) for name, parameter in trainer.model.named_parameters()]
        generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        generation.llm.reset_prefix_cache()

    generation.sync_weights = sync_weights


class Turns:
    """Lines of the standard input and output, by which a side is asked for a step and reports its time."""

    def __init__(self, asked: TextIO, told: TextIO) -> None:
        self._asked, self._told = asked, told
        self._began = 0.0

    def wait(self) -> None:
        """Wait until a step is asked for; the process ends where none will be."""
        if not self._asked.readline():
            os._exit(0)
        self._began = time.process_time()

    def report(self) -> None:
        """Report the processor seconds since then."""
        self.tell(time.process_time() - self._began)

    def tell(self, seconds: float) -> None:
        """Report a time."""
        self._told.write(f"{seconds}\n")
        self._told.flush()


def main() -> None:
    """Take steps; what libraries print goes to the standard error."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    turns, (name, folder, prompts) = Turns(sys.stdin, told), sys.argv[1:]
    texts = json.loads(Path(prompts).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    if name == "ours":
        step = ours(Path(folder), texts)
        while True:
            turns.wait()
            turns.tell(step())
    os.environ |= {**ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as scratch:
        trl(Path(folder), texts, turns, scratch, with_vllm=name == "trl")


if __name__ == "__main__":
    main()
