"""Prefill and decode of several models, timed in vLLM side by side; a program of its own: vLLM's settings stay in it.

All models are held at once, an engine a process, and measured in turn, each right after the first of them: shared
machines change their speed within seconds, and only a time beside another one tells which model is the faster, and by
how much. Importing vLLM takes longer than all else, so it is done once, in a server that the processes fork from.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

from components.core.base.errors import StageFailed
from components.core.base.processes import end_with_parent
from components.core.serving.engine import BatchTime, Engine
from components.core.serving.load_profile import LoadProfile, Workload
from components.core.serving.settings import ENVIRONMENT, require_vllm, vllm_uses_gpu

HELD_WEIGHT_BYTES = 2 << 30
"""Models whose weights together exceed this are measured one after another instead of side by side."""

PRELOADED_MODULES = (
    "components.core.model.decoder",
    "components.core.serving.decoder",
    "components.core.serving.engine",
    "components.core.serving.weight_transfer",
    "vllm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.gpu_worker",
)
"""What every process would import after the fork, each anew."""


def measure_step_ms(folders: list[Path], workload: Workload, threads: int) -> list[list[float]]:
    """What `measure_times` measures in one number: time of a decode step of a batch, prefill spread over its steps."""
    deployment, new = LoadProfile(**workload.model_dump(include=set(Workload.model_fields))), workload.new_tokens
    return [
        [(time.first_token_ms + (new - 1) * time.step_ms) / new for time in times]
        for times in measure_times(folders, deployment, threads)
    ]


def measure_times(folders: list[Path], deployment: LoadProfile, threads: int) -> list[list[BatchTime]]:
    """Time the prefill of a batch and the decode steps that follow, for each model folder.

    Args:
        folders: models, without tokenizer.
        deployment: batch, lengths, rounds and precision.
        threads: CPU threads of each engine.

    Returns:
        For each folder a time a round: of the first as it was, of those held beside it at its pace (`at_one_pace`).

    Raises:
        MissingPackage: vLLM is not installed.
        StageFailed: vLLM could not run one of the models.
    """
    require_vllm()
    order = {
        "folders": [str(folder) for folder in folders],
        "deployment": deployment.model_dump(include=set(LoadProfile.model_fields)),
        "threads": threads,
    }
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    if deployment.tensor_parallel > 1:  # on a CPU each would want a memory node of its own
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    command = [sys.executable, "-W", "ignore", "-m", "components.core.serving.timing"]
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
    return [[BatchTime(*pair) for pair in pairs] for pairs in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Read the order from standard input, and write the times to standard output."""
    end_with_parent(os.getppid())
    order = json.loads(sys.stdin.read())
    folders, deployment, threads = order["folders"], LoadProfile.parse(order["deployment"]), order["threads"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED_MODULES))
    weight_bytes = sum(file.stat().st_size for folder in folders for file in Path(folder).glob("*.safetensors"))
    together = weight_bytes <= HELD_WEIGHT_BYTES and not vllm_uses_gpu()  # there an engine takes its share of memory
    held = len(folders) if together else 1
    measured: list[list[BatchTime]] = []
    for start in range(0, len(folders), held):
        measured += _measure_together(context, folders[start : start + held], deployment, threads)
    sys.stdout.write(json.dumps([[astuple(time) for time in times] for times in measured]) + "\n")


def _measure_together(
    context: ForkServerContext, folders: list[str], deployment: LoadProfile, threads: int
) -> list[list[BatchTime]]:
    """Hold these models at once, and measure them in turn."""
    pipes, processes = [], []
    for folder in folders:
        ours, theirs = context.Pipe()
        alone = deployment.tensor_parallel == 1  # daemons may not have the processes that share a layer
        process = context.Process(target=_serve, args=(theirs, folder, deployment, threads), daemon=alone)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()  # the engine is ready
    times = _in_turn(pipes, deployment.rounds)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    return times


def _in_turn(pipes: Sequence[Connection], rounds: int) -> list[list[BatchTime]]:
    """Ask each engine once a round, the first one before every other."""
    first, *others = pipes
    if not others:
        return [[_ask(first) for _ in range(rounds)]]
    return at_one_pace([[(_ask(first), _ask(pipe)) for pipe in others] for _ in range(rounds)])


def at_one_pace(pairs: Sequence[Sequence[tuple[BatchTime, BatchTime]]]) -> list[list[BatchTime]]:
    """Times of models as they would be, had the machine always been as fast as in the median round.

    Args:
        pairs: for each round, for each other model, the time of the first model and that of the other right after it.

    Returns:
        For each model a time a round. Those of the first tell how the machine's speed changed: medians within a round.
        Those of the others are their share of the first model's time beside them, times its median.
    """
    first = [_median([beside for beside, _ in found]) for found in pairs]
    pace = _median(first)
    others = [
        [
            BatchTime(
                pace.first_token_ms * time.first_token_ms / beside.first_token_ms,
                pace.step_ms * time.step_ms / beside.step_ms,
            )
            for beside, time in model
        ]
        for model in zip(*pairs, strict=True)
    ]
    return [first, *others]


def _median(times: Sequence[BatchTime]) -> BatchTime:
    return BatchTime(*(statistics.median(values) for values in zip(*map(astuple, times), strict=True)))


def _ask(pipe: Connection) -> BatchTime:
    """Have an engine measured."""
    pipe.send(True)
    time: BatchTime = pipe.recv()
    return time


def _serve(pipe: Connection, folder: str, deployment: LoadProfile, threads: int) -> None:
    """Hold one engine, and measure it whenever asked."""
    batch, prompt, new = deployment.batch_size, deployment.prompt_tokens, deployment.new_tokens
    with Engine(
        Path(folder),
        max_model_len=prompt + new,
        max_num_seqs=batch,
        dtype=deployment.dtype,
        threads=threads,
        tensor_parallel=deployment.tensor_parallel,
    ) as engine:
        pipe.send(True)
        while pipe.recv():
            pipe.send(engine.batch_time(batch, prompt, new))


if __name__ == "__main__":
    main()
