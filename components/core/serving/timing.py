"""Prefill and decode time of several models in vLLM, measured in turn.

A shared machine changes its speed within seconds. Every model is therefore measured right after the first one, and what
counts is its share of the first one's time. All engines live in one process of its own, because importing vLLM takes
longer than everything else, and because vLLM's settings are those of a process.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path

from components.core.base.errors import StageFailed
from components.core.base.processes import end_with_owner
from components.core.serving.engine import BatchTime, Engine
from components.core.serving.load_profile import LoadProfile, Workload
from components.core.serving.settings import process_environment, require_vllm, vllm_uses_gpu

MAX_WEIGHT_BYTES = 2 << 30
"""Models whose files exceed this together are measured one after the other, not in turn."""


def measure_step_ms(folders: list[Path], workload: Workload, threads: int) -> list[list[float]]:
    """Mean time of a decode step of a batch in each round, the prefill spread over the steps, milliseconds."""
    profile, new = LoadProfile(**workload.model_dump(include=set(Workload.model_fields))), workload.new_tokens
    return [
        [(time.first_token_ms + (new - 1) * time.step_ms) / new for time in times]
        for times in measure_times(folders, profile, threads)
    ]


def measure_times(folders: list[Path], profile: LoadProfile, threads: int) -> list[list[BatchTime]]:
    """Measure the prefill of a batch and the decode steps after it, for each model folder.

    Args:
        folders: models, with or without a tokenizer.
        profile: batch, lengths, rounds and precision.
        threads: CPU threads of the engines.

    Returns:
        The time of each model in each round. The first model's is raw; the others are divided by the first model's
        drift in that round (`without_drift`).

    Raises:
        MissingPackage: vLLM is not installed.
        StageFailed: vLLM could not run one of the models.
    """
    require_vllm()
    weight_bytes = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    in_turn = weight_bytes <= MAX_WEIGHT_BYTES and not vllm_uses_gpu()  # on a GPU an engine takes its share of memory
    groups = [folders] if in_turn else [[folder] for folder in folders]
    return [times for group in groups for times in _measure_in_process(group, profile, threads)]


def without_drift(rounds: Sequence[Sequence[tuple[BatchTime, BatchTime]]]) -> list[list[BatchTime]]:
    """Times that the models would have had on a machine that is always as fast as in the median round.

    Args:
        rounds: for each round and each model but the first, the time of the first model and that of the model.

    Returns:
        The time of each model in each round. The first model's are medians within the round. Those of the others are
        their share of the first model's time right before, times the median of the first model's.
    """
    first = [_median([reference for reference, _ in pairs]) for pairs in rounds]
    usual = _median(first)
    others = [
        [
            BatchTime(
                usual.first_token_ms * time.first_token_ms / reference.first_token_ms,
                usual.step_ms * time.step_ms / reference.step_ms,
            )
            for reference, time in model
        ]
        for model in zip(*rounds, strict=True)
    ]
    return [first, *others]


def _median(times: Sequence[BatchTime]) -> BatchTime:
    return BatchTime(*(statistics.median(values) for values in zip(*map(astuple, times), strict=True)))


def _measure_in_process(folders: list[Path], profile: LoadProfile, threads: int) -> list[list[BatchTime]]:
    """Run this module as a program: the request goes to its standard input, the times come from its standard output."""
    request = {
        "folders": [str(folder) for folder in folders],
        "profile": profile.model_dump(include=set(LoadProfile.model_fields)),
    }
    environment = process_environment(threads)
    if profile.tensor_parallel > 1:  # else vLLM wants a memory node for each of them on a CPU
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "components.core.serving.timing"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        start_new_session=True,  # `end_with_owner` kills the process group
        check=False,
    )
    if done.returncode:
        raise StageFailed(f"vLLM could not run the models to be measured:\n{done.stderr[-2000:]}")
    return [[BatchTime(*pair) for pair in pairs] for pairs in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Read a request from standard input, and write the times to standard output."""
    end_with_owner(os.getppid())
    request = json.loads(sys.stdin.read())
    profile = LoadProfile.parse(request["profile"])
    with ExitStack() as open_engines:
        engines = [open_engines.enter_context(_engine(folder, profile)) for folder in request["folders"]]
        times = _measure_in_turn(engines, profile)
    sys.stdout.write(json.dumps([[astuple(time) for time in model] for model in times]) + "\n")


def _engine(folder: str, profile: LoadProfile) -> Engine:
    """An engine for the load."""
    return Engine(
        Path(folder),
        max_model_len=profile.prompt_tokens + profile.new_tokens,
        max_num_seqs=profile.batch_size,
        dtype=profile.dtype,
        tensor_parallel=profile.tensor_parallel,
    )


def _measure_in_turn(engines: Sequence[Engine], profile: LoadProfile) -> list[list[BatchTime]]:
    """Measure each engine once a round, the first one before every other."""

    def measure(engine: Engine) -> BatchTime:
        return engine.batch_time(profile.batch_size, profile.prompt_tokens, profile.new_tokens)

    first, *others = engines
    if not others:
        return [[measure(first) for _ in range(profile.rounds)]]
    return without_drift([[(measure(first), measure(other)) for other in others] for _ in range(profile.rounds)])


if __name__ == "__main__":
    main()
