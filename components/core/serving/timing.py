"""Prefill and decode time of several models in vLLM, measured in turn.

A shared machine changes its speed within seconds. Every model is therefore measured right after the first one in every
round, and what counts is its share of the first one's time. The engines live in a process of its own, because importing
vLLM takes longer than everything else, and because vLLM's settings are those of a process: all of them in one where
they fit into memory together, else the first one and one other, else one engine at a time.
"""

import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

from components.core.base.errors import StageFailed
from components.core.base.normal_distribution import Z_95
from components.core.base.processes import end_with_owner
from components.core.model.architecture import WEIGHT_BYTES
from components.core.model.inspection import read_architecture, stored_dtype
from components.core.runtime.context import StageContext
from components.core.runtime.hardware import vllm_uses_gpu
from components.core.serving.engine import BatchTime, Engine
from components.core.serving.load_profile import LoadProfile
from components.core.serving.server_log import describe_lines
from components.core.serving.serving_config import ServingConfig
from components.core.serving.settings import kv_cache_bytes, process_environment, require_vllm
from components.core.serving.start_report import report_start

OPEN_SHARE = 0.5
"""Share of the memory that the engines open at the same time may take; loading needs the rest."""

MAX_REPEATS = 4
"""How often as many rounds as asked for are measured where the times differ too much."""

PROGRESS = re.compile(r"measured (\d+) (\d+)\n")
"""A line of standard output that tells progress."""

Pair = tuple[BatchTime, BatchTime]
"""Time of the first model, and that of another model measured right after it."""


@dataclass(frozen=True)
class _Settings:
    """How models are measured, alike in every process.

    Attributes:
        profile: batch, lengths, rounds and precision.
        threads: CPU threads of the engines.
        max_error: `relative_error` up to which rounds are repeated.
        random_weights: weights are made at random in memory.
    """

    profile: LoadProfile
    threads: int
    max_error: float
    random_weights: bool

    @property
    def one_round(self) -> Self:
        """The same for a single round."""
        return replace(self, profile=self.profile.model_copy(update={"rounds": 1}), max_error=math.inf)


def no_count(done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class TimingReport:
    """Tells how far a measurement is.

    Attributes:
        count: takes how much is done, and of how much: engines opened and batches generated.
        opening: a block in which an engine opens, which tells nothing of how far it is.
    """

    count: Callable[[int, int], None] = no_count
    opening: Callable[[], AbstractContextManager[None]] = nullcontext

    @classmethod
    def to_context(cls, context: StageContext, what: str) -> Self:
        """As progress of a stage, which calls it `what`."""
        return cls(partial(context.progress, what=what), partial(report_start, context))


SILENT = TimingReport()


def measure_step_ms(
    folders: list[Path],
    profile: LoadProfile,
    threads: int,
    memory_gib: float,
    max_error: float = math.inf,
    report: TimingReport = SILENT,
) -> list[list[float]]:
    """Mean time of a decode step of a batch in each round, the prefill spread over the steps, milliseconds."""
    new = profile.new_tokens
    return [
        [(time.first_token_ms + (new - 1) * time.step_ms) / new for time in times]
        for times in measure_times(folders, profile, threads, memory_gib, max_error, report)
    ]


def measure_times(
    folders: list[Path],
    profile: LoadProfile,
    threads: int,
    memory_gib: float,
    max_error: float = math.inf,
    report: TimingReport = SILENT,
    random_weights: bool = False,
) -> list[list[BatchTime]]:
    """Measure the prefill of a batch and the decode steps after it, for each model folder.

    Args:
        folders: models, with or without a tokenizer.
        profile: batch, lengths, rounds and precision.
        threads: CPU threads of the engines.
        memory_gib: memory of the stage; engines that do not fit into half of it are not open at the same time.
        max_error: rounds are repeated, up to four times, until `relative_error` of each model's step time is no larger.
        report: takes progress.
        random_weights: each folder has a `config.json` alone, and the weights are made at random in memory.

    Returns:
        The time of each model in each round. The first model's is raw; the others are divided by the first model's
        drift in that round (`without_drift`).

    Raises:
        MissingPackage: vLLM is not installed.
        StageFailed: vLLM could not run one of the models.
    """
    require_vllm()
    settings = _Settings(profile, threads, max_error, random_weights)
    first, *others = folders
    if not others:
        times = _measure_in_process([first], settings, report)
        return [[time for (time,) in times]]
    groups = [folders] if _fit(folders, profile, memory_gib) else [[first, other] for other in others]
    by_group = [
        [_pairs(readings) for readings in _measure_in_process(group, settings, part)]
        if _fit(group, profile, memory_gib)
        else _measure_apart(group, settings, part)
        for group, part in zip(groups, _parts(report, len(groups)), strict=True)
    ]
    # One group may have needed more rounds than another.
    return without_drift(
        [[pair for pairs in same_round for pair in pairs] for same_round in zip(*by_group, strict=False)]
    )


def _parts(report: TimingReport, count: int) -> list[TimingReport]:
    """Reports of equal parts of a measurement, one after the other."""

    def tell(number: int, done: int, total: int) -> None:
        report.count(number * total + done, count * total)

    return [replace(report, count=partial(tell, number)) for number in range(count)]


def _fit(folders: Sequence[Path], profile: LoadProfile, memory_gib: float) -> bool:
    """Whether the engines may be open at the same time. On a GPU never: each takes its share of the memory."""
    if vllm_uses_gpu():
        return False
    length = profile.prompt_tokens + profile.new_tokens
    needed = 0
    for folder in folders:
        dtype = profile.dtype or stored_dtype(folder)
        needed += max(2, WEIGHT_BYTES[dtype]) * read_architecture(folder).parameters
        needed += kv_cache_bytes(folder, dtype=dtype, max_model_len=length, max_num_seqs=profile.batch_size)
    return needed <= OPEN_SHARE * memory_gib * 2**30


def _measure_apart(folders: Sequence[Path], settings: _Settings, report: TimingReport) -> list[list[Pair]]:
    """Measure the first model and another one, with one engine open at a time: both are opened in every round."""
    rounds = settings.profile.rounds
    parts = iter(_parts(report, rounds * len(folders)))
    readings = [
        [_measure_in_process([folder], settings.one_round, next(parts))[0][0] for folder in folders]
        for _ in range(rounds)
    ]
    return [_pairs(row) for row in readings]


def _pairs(readings: Sequence[BatchTime]) -> list[Pair]:
    """Pairs of the first model's time and another's, from the readings of a round in the order they were made."""
    return list(zip(readings[::2], readings[1::2], strict=True))


def without_drift(rounds: Sequence[Sequence[Pair]]) -> list[list[BatchTime]]:
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


def _measure_in_process(folders: Sequence[Path], settings: _Settings, report: TimingReport) -> list[list[BatchTime]]:
    """Run this module as a program: the request goes to its standard input, the times come from its standard output.

    Returns:
        The readings of each round in the order they were made: before every other model the first one.
    """
    request = {
        "folders": [str(folder) for folder in folders],
        "profile": settings.profile.model_dump(include=set(LoadProfile.model_fields)),
        "max_error": settings.max_error,
        "random_weights": settings.random_weights,
    }
    line = ""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "components.core.serving.timing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=process_environment(settings.threads, settings.profile.tensor_parallel),
            start_new_session=True,  # `end_with_owner` kills the process group
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and its status tells more
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            with ExitStack() as opening:
                opening.enter_context(report.opening())
                for line in process.stdout:
                    if told := PROGRESS.fullmatch(line):
                        opening.close()
                        report.count(int(told[1]), int(told[2]))
                        if int(told[1]) < len(folders):
                            opening.enter_context(report.opening())
        except BaseException:
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            reason = describe_lines(errors.read().splitlines())
            raise StageFailed(f"vLLM could not run the models to be measured:\n{reason}")
    return [[BatchTime(*time) for time in readings] for readings in json.loads(line)]


def main() -> None:
    """Read a request from standard input, and write progress and the times to standard output."""
    end_with_owner(os.getppid())
    request = json.loads(sys.stdin.read())
    profile, folders = LoadProfile.parse(request["profile"]), request["folders"]
    turns = max(1, 2 * (len(folders) - 1))
    done = 0

    def tell(rounds: int) -> None:
        """Count one engine or batch, of those of so many rounds at least."""
        nonlocal done
        done += 1
        total = len(folders) + turns * max(profile.rounds, rounds)
        sys.stdout.write(f"measured {done} {total}\n")
        sys.stdout.flush()

    with ExitStack() as open_engines:
        engines = []
        for folder in folders:
            engines.append(open_engines.enter_context(_engine(folder, profile, request["random_weights"])))
            tell(0)
        rounds: list[list[BatchTime]] = []
        while needs_round(rounds, profile.rounds, request["max_error"]):
            rounds.append(_measure_round(engines, profile, partial(tell, len(rounds) + 1)))
    sys.stdout.write(json.dumps([[astuple(time) for time in readings] for readings in rounds]) + "\n")


def needs_round(rounds: Sequence[Sequence[BatchTime]], least: int, max_error: float) -> bool:
    """Whether another round is to be measured.

    Args:
        rounds: readings so far, in each round one of each turn of an engine.
        least: number of rounds that are measured in any case.
        max_error: `relative_error` at which the step times count as known.
    """
    if len(rounds) < least:
        return True
    if len(rounds) >= MAX_REPEATS * least:
        return False
    return any(relative_error([time.step_ms for time in turn]) > max_error for turn in zip(*rounds, strict=True))


def relative_error(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean, as a fraction of it; infinite for less than two values."""
    if len(values) < 2:
        return math.inf
    return Z_95 * statistics.stdev(values) / math.sqrt(len(values)) / statistics.fmean(values)


def _engine(folder: str, profile: LoadProfile, random_weights: bool) -> Engine:
    """An engine for the load."""
    return Engine(
        Path(folder),
        max_model_len=profile.prompt_tokens + profile.new_tokens,
        max_num_seqs=profile.batch_size,
        serving=ServingConfig(dtype=profile.dtype, tensor_parallel=profile.tensor_parallel),
        random_weights=random_weights,
    )


def _measure_round(engines: Sequence[Engine], profile: LoadProfile, tell: Callable[[], None]) -> list[BatchTime]:
    """Measure each engine once, the first one before every other."""
    first, *others = engines
    turns = [engine for other in others for engine in (first, other)] or [first]
    times = []
    for engine in turns:
        times.append(engine.batch_time(profile.batch_size, profile.prompt_tokens, profile.new_tokens))
        tell()
    return times


if __name__ == "__main__":
    main()
