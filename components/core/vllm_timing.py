"""Decode steps of several models, timed in vLLM side by side; a program of its own, so that vLLM's settings stay in it.

All models are held at once, an engine a process, and measured in turn, round by round: what slows the machine for a
while slows them alike. Importing vLLM takes longer than all else, so it is done once, in a server that the processes
fork from.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

from components.core.errors import StageFailed
from components.core.processes import end_with_parent
from components.core.vllm_engine import Engine
from components.core.vllm_settings import ENVIRONMENT, require_vllm
from components.core.workload import Workload

HELD_WEIGHT_BYTES = 2 << 30
"""Models whose weights together exceed this are measured one after another instead of side by side."""

REPEATS = 2
"""Measurements of a model in each round, after one to warm up: the models before it have used the caches."""

PRELOADED_MODULES = (
    "components.core.model",
    "components.core.vllm_decoder",
    "components.core.vllm_engine",
    "components.core.weight_transfer",
    "vllm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.gpu_worker",
)
"""What every process would import after the fork, each anew."""


def measure_step_ms(folders: list[Path], workload: Workload, threads: int) -> list[list[float]]:
    """Time of one decode step of a batch, prefill spread over its steps, for each model folder.

    Args:
        folders: models, without tokenizer.
        workload: batch, lengths and rounds.
        threads: CPU threads of each engine.

    Returns:
        For each folder some numbers a round, milliseconds.

    Raises:
        MissingPackage: vLLM is not installed.
        StageFailed: vLLM could not run one of the models.
    """
    require_vllm()
    order = {
        "folders": [str(folder) for folder in folders],
        "workload": workload.model_dump(include=set(Workload.model_fields)),
        "threads": threads,
    }
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", "-m", "components.core.vllm_timing"]
    done = subprocess.run(
        command,
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env=environment,
        start_new_session=True,  # so that it can end as a whole, with us
        check=False,
    )
    if done.returncode:
        raise StageFailed(f"vLLM could not run the models to be measured:\n{done.stderr[-2000:]}")
    steps: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return steps


def main() -> None:
    """Read the order from standard input, and write the times to standard output."""
    end_with_parent(os.getppid())
    order = json.loads(sys.stdin.read())
    folders, workload, threads = order["folders"], Workload.parse(order["workload"]), order["threads"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED_MODULES))
    weight_bytes = sum(file.stat().st_size for folder in folders for file in Path(folder).glob("*.safetensors"))
    held = len(folders) if weight_bytes <= HELD_WEIGHT_BYTES else 1
    steps: list[list[float]] = []
    for start in range(0, len(folders), held):
        steps += _measure_together(context, folders[start : start + held], workload, threads)
    sys.stdout.write(json.dumps(steps) + "\n")


def _measure_together(
    context: ForkServerContext, folders: list[str], workload: Workload, threads: int
) -> list[list[float]]:
    """Hold these models at once, and measure them in turn."""
    pipes, processes = [], []
    for folder in folders:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, folder, workload, threads), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()  # the engine is ready
    steps: list[list[float]] = [[] for _ in folders]
    for _ in range(workload.rounds):
        for pipe, times in zip(pipes, steps, strict=True):
            pipe.send(True)
            times += pipe.recv()
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    return steps


def _serve(pipe: Connection, folder: str, workload: Workload, threads: int) -> None:
    """Hold one engine, and measure it whenever asked."""
    batch, prompt, new = workload.batch_size, workload.prompt_tokens, workload.new_tokens
    with Engine(Path(folder), max_model_len=prompt + new, max_num_seqs=batch, threads=threads) as engine:
        pipe.send(True)
        while pipe.recv():
            speeds = engine.throughput(batch, prompt, new, REPEATS)
            pipe.send([1000 * batch / tokens_per_s for tokens_per_s in speeds])


if __name__ == "__main__":
    main()
