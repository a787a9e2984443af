"""Decode steps of several models, timed in vLLM side by side; a program of its own, so that vLLM's settings stay in it.

All models are held at once, an engine a process, and measured in turn, round by round: what slows the machine for a
while slows them alike. Importing vLLM takes longer than all else, so it is done once, before the processes are forked.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from components.core.errors import StageFailed
from components.core.vllm_engine import Engine
from components.core.vllm_launch import end_with_parent, import_vllm
from components.core.vllm_settings import ENVIRONMENT, require_vllm
from components.search.config import Measurement

HELD_WEIGHT_BYTES = 2 << 30
"""Models whose weights together exceed this are measured one after another instead of side by side."""


def measure_step_ms(folders: list[Path], measurement: Measurement, threads: int) -> list[list[float]]:
    """Time of one decode step of a batch, prefill spread over its steps, for each model folder.

    Args:
        folders: models, without tokenizer.
        measurement: batch, lengths and rounds.
        threads: CPU threads of each engine.

    Returns:
        For each folder one number a round, milliseconds.

    Raises:
        MissingPackage: vLLM is not installed.
        StageFailed: vLLM could not run one of the models.
    """
    require_vllm()
    order = {
        "folders": [str(folder) for folder in folders],
        "measurement": measurement.model_dump(),
        "threads": threads,
    }
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", "-m", "components.search.measure"]
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
        raise StageFailed(f"vLLM could not run the models that block costs are measured on:\n{done.stderr[-2000:]}")
    steps: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return steps


def main() -> None:
    """Read the order from standard input, and write the times to standard output."""
    order = json.loads(sys.stdin.read())
    folders, measurement, threads = order["folders"], Measurement(**order["measurement"]), order["threads"]
    end_with_parent(os.getppid())
    import_vllm()
    weight_bytes = sum(file.stat().st_size for folder in folders for file in Path(folder).glob("*.safetensors"))
    held = len(folders) if weight_bytes <= HELD_WEIGHT_BYTES else 1
    steps: list[list[float]] = []
    for start in range(0, len(folders), held):
        steps += _measure_together(folders[start : start + held], measurement, threads)
    sys.stdout.write(json.dumps(steps) + "\n")


def _measure_together(folders: list[str], measurement: Measurement, threads: int) -> list[list[float]]:
    """Hold these models at once, and measure them in turn."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for folder in folders:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, folder, measurement, threads), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()  # the engine is ready
    steps: list[list[float]] = [[] for _ in folders]
    for _ in range(measurement.rounds):
        for pipe, times in zip(pipes, steps, strict=True):
            pipe.send(True)
            times.append(pipe.recv())
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    return steps


def _serve(pipe: Connection, folder: str, measurement: Measurement, threads: int) -> None:
    """Hold one engine, and measure it whenever asked."""
    end_with_parent(os.getppid())
    batch, prompt, new = measurement.batch_size, measurement.prompt_tokens, measurement.new_tokens
    with Engine(Path(folder), max_model_len=prompt + new, max_num_seqs=batch, threads=threads) as engine:
        pipe.send(True)
        while pipe.recv():
            [tokens_per_s] = engine.throughput(batch, prompt, new, 1)
            pipe.send(1000 * batch / tokens_per_s)


if __name__ == "__main__":
    main()
