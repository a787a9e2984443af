"""Runs one stage, the same way for all: key, cached result or checkpoint, inputs, the stage, outputs, record."""

import contextlib
import functools
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from pydantic import JsonValue

from components.core.base.config import Config
from components.core.base.errors import CorruptArtifact, InputError, StageFailed, TesseraError
from components.core.base.fault_injection import fault_point
from components.core.base.processes import peak_resident_bytes, without_garbage_collection
from components.core.base.run_name import check_run_name
from components.core.base.scratch_dir import scratch_dir
from components.core.runtime.code_digest import code_digest
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.events import Events, Reporter, forward_log_warnings
from components.core.runtime.hardware import timing_device
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.runtime.stage import Stage
from components.core.runtime.torchrun import GPU_PEAK, run_ranks
from components.core.store.store import StageRecord, Store, key_of

Digests = Mapping[str, str | list[str]]
"""Digest of each input artifact by name; a list where the stage takes many, or where each shard made one."""

INTERRUPTED_EXIT_CODE = 130
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stage_key(stage: Stage, config: Config, inputs: Digests) -> str:
    """The name of a computation: equal keys have equal results.

    Hash of the stage's name, the digest of the code that can change its result, its canonical configuration, the
    digests of its inputs and, where it measures times, the processors that this machine measures them on.
    """
    code, libraries = code_digest(stage.entry)
    own = select_shard_inputs(stage, config, inputs)
    return key_of(
        stage=stage.name,
        code=code,
        libraries=libraries,
        config=config.canonical(),
        inputs=own,
        device=_measured_on(stage, config, own),
    )


def _measured_on(stage: Stage, config: Config, inputs: Digests) -> str | None:
    """The processors that a stage measures times on; None if it measures none."""
    return timing_device() if stage.measures_time(config, inputs) else None


def select_shard_inputs(stage: Stage, config: Config, inputs: Digests) -> Digests:
    """Inputs of one shard. A list with one artifact per shard is narrowed to this shard's if the input is single."""
    index, _, _ = str(getattr(config, "shard", None) or "0/1").partition("/")
    single = {name for name, declared in stage.inputs.items() if not declared.many}
    return {
        name: value[int(index)] if name in single and isinstance(value, list) else value
        for name, value in inputs.items()
    }


def load_verified_record(
    store: Store, key: str, stage: Stage | None = None, notice: Callable[[str], None] = lambda text: None
) -> StageRecord | None:
    """The record of a finished stage after its outputs were verified by size and digest; None if it has to run.

    Args:
        store: holds the record and the outputs.
        key: name of the computation.
        stage: the stage of the record; if given, outputs of another kind than it makes count as damage.
        notice: called with the reason why a result in the store cannot be used.
    """
    try:
        record = store.checked_record(key)
        for name, digest in record.outputs.items() if record is not None else ():
            kind = store.verify(digest).kind
            if stage is not None and (name not in stage.outputs or kind != stage.outputs[name].kind):
                raise CorruptArtifact(f"artifact {digest[:12]} is a {kind}, and no {name} of stage {stage.name}")
    except TesseraError as error:
        notice(f"not used, computed anew: {error.message}")
        return None
    return record


def run_stage(
    stage: Stage,
    config: Config,
    inputs: Digests,
    *,
    store: Store,
    label: str | None = None,
    run: str | None = None,
    placement: Placement | None = None,
    reporter: Reporter | None = None,
) -> StageRecord:
    """Compute a stage, or return its cached result.

    Args:
        stage: what to run.
        config: its checked configuration.
        inputs: digests of the artifacts it reads.
        store: where artifacts and records are.
        label: the role of this stage in the run; by default its name.
        run: the run that this belongs to; without a run only the result is recorded.
        placement: processes, threads, devices; never changes the result.
        reporter: takes events; by default a JSONL file in the run's local folder.

    Raises:
        InputError: an input is missing or of the wrong kind; the stage refused its data; no run can have this name.
        StageFailed: the stage raised an error of its own.
        Interrupted: SIGTERM or Ctrl-C arrived; a checkpoint was saved if the stage has checkpoints.
    """
    if run is not None:
        check_run_name(run)
    label, placement = label or stage.name, placement or Placement()
    inputs = select_shard_inputs(stage, config, inputs)
    _check_inputs(stage, inputs, store)
    key = stage_key(stage, config, inputs)
    if reporter is None:
        reporter = Events(events_path(store, run or key[:16], label))
    forward_log_warnings(reporter)
    started = time.time()
    reporter.emit({"type": "start", "time": started, "stage": stage.name, "label": label, "key": key})
    fault_point("stage.begun")
    record = load_verified_record(store, key, stage, _noting(reporter))
    cached = record is not None
    try:
        if record is None:
            record, cached = _compute_alone(stage, config, inputs, key, store, placement, reporter)
    except Interrupted:
        reporter.emit({"type": "interrupted", "time": time.time()})
        raise
    except TesseraError as error:
        reporter.emit(failure_event(error.message, error.hint, error.exit_code))
        raise
    except OSError as error:
        reporter.emit(failure_event(str(error), None, 1))
        raise
    except Exception as error:
        message = f"{stage.name} stopped: {type(error).__name__}: {error}"
        reporter.emit(failure_event(message, None, 1) | {"traceback": traceback.format_exc()})
        raise StageFailed(message) from error
    _record_completion(record, label, cached, started, store, run, reporter)
    return record


def lookup_cached_stage(
    stage: Stage, config: Config, inputs: Digests, *, store: Store, label: str, run: str
) -> StageRecord | None:
    """The cached result of a stage, recorded in the run as `run_stage` does; None if the stage has to run."""
    started = time.time()
    key = stage_key(stage, config, inputs)
    record = load_verified_record(store, key, stage)
    if record is None:
        return None
    reporter = Events(events_path(store, run, label))
    reporter.emit({"type": "start", "time": started, "stage": stage.name, "label": label, "key": key})
    _record_completion(record, label, True, started, store, run, reporter)
    return record


def _record_completion(
    record: StageRecord, label: str, cached: bool, started: float, store: Store, run: str | None, reporter: Reporter
) -> None:
    """Record in the run that a stage has its result, and report it."""
    ended = time.time()
    seconds = ended - started
    if run is not None:
        document = {"label": label, "stage": record.stage, "key": record.key, "cached": cached}
        times = {"seconds": seconds, "started": started, "finished": ended}
        fault_point("stage.settle")
        store.put_document(f"runs/{run}/stages/{label}.json", document | times)
        fault_point("stage.settled")
    reporter.emit(
        {"type": "cached" if cached else "finish", "time": ended, "seconds": seconds, "result": record.result}
    )


def events_path(store: Store, run: str, label: str) -> Path:
    """File of this machine that takes the events of one stage of a run."""
    return store.local / "runs" / run / f"{label.replace('/', '.')}.jsonl"


def load_entry(entry: str) -> Callable[..., dict[str, JsonValue]]:
    """The function behind `module:function`."""
    module, _, name = entry.partition(":")
    with without_garbage_collection():
        function: Callable[..., dict[str, JsonValue]] = getattr(importlib.import_module(module), name)
    return function


def _check_inputs(stage: Stage, inputs: Digests, store: Store) -> None:
    """Check that every input is declared, in the store, and of the right kind."""
    for name in inputs:
        if name not in stage.inputs:
            raise InputError(f"stage {stage.name} has no input {name!r}", hint=f"it takes {', '.join(stage.inputs)}")
    for name, declared in stage.inputs.items():
        value = inputs.get(name)
        if not value:
            if not declared.optional:
                raise InputError(
                    f"stage {stage.name} needs the input {name!r}: {declared.doc}",
                    hint=f"for a stage alone: --input {name}=PATH; in a recipe an earlier stage makes it",
                )
            continue
        for digest in value if isinstance(value, list) else [value]:
            kind = store.manifest(digest).kind
            if kind != declared.kind:
                raise InputError(
                    f"input {name!r} of stage {stage.name} is a {kind} ({digest[:12]}), not a {declared.kind}",
                    hint=declared.doc,
                )


def _compute_alone(
    stage: Stage,
    config: Config,
    inputs: Digests,
    key: str,
    store: Store,
    placement: Placement,
    reporter: Reporter,
) -> tuple[StageRecord, bool]:
    """Compute a stage under a lock of this machine; after waiting for the lock, take the result of its holder.

    Returns:
        The record, and whether another process made it.
    """
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(stop_signals())
        waiting: list[bool] = []

        def wait() -> None:
            if not waiting:
                _noting(reporter)("another run computes this: waiting")
                waiting.append(True)

        scratch = stack.enter_context(scratch_dir(store.local / "tmp", f"{stage.name}-{key[:16]}", wait))
        stack.enter_context(contextlib.closing(stopping))  # before the folder is removed, which is to be done whole
        fault_point("stage.alone")
        record = load_verified_record(store, key, stage)
        if record is not None:
            return record, True
        resume = Resume(store.resume_folder(key), mirror=functools.partial(store.push_resume, key))
        context = StageContext(reporter, resume, scratch, placement, stopping=stopping)
        return _compute(stage, config, inputs, key, store, context), False


def _compute(
    stage: Stage, config: Config, inputs: Digests, key: str, store: Store, context: StageContext
) -> StageRecord:
    """Fetch the inputs, run the stage, store its outputs, then the record that names them."""
    started = time.monotonic()
    out, result, work_seconds = fetch_and_work(stage, config, inputs, key, store, context)
    fault_point("stage.computed")
    with store.writing():  # until the record names the outputs
        outputs = _store_outputs(stage, out, store)
        fault_point("stage.stored")
        record = _record(stage, config, inputs, key, outputs, result)
        taken = {"seconds": time.monotonic() - started, "work_seconds": work_seconds}
        record = record.model_copy(update={**taken, "peak_memory_bytes": _peak_memory_bytes(context)})
        record = store.put_stage_record(record)
        fault_point("stage.recorded")
    store.drop_resume(key)
    fault_point("stage.rested")
    return record


def _peak_memory_bytes(context: StageContext) -> int | None:
    """Peak memory of the stage's largest process; of tensors on its fullest GPU, where it has GPUs and used one."""
    if not context.placement.gpus:
        return peak_resident_bytes()
    peaks = [int(file.read_text(encoding="utf-8")) for file in context.scratch.glob(f"{GPU_PEAK}-*")]
    if "torch" in sys.modules:  # this module is imported without it
        peaks.append(importlib.import_module("components.core.runtime.devices").peak_gpu_bytes())
    return max(peaks, default=0) or None


def fetch_and_work(
    stage: Stage, config: Config, inputs: Digests, key: str, store: Store, context: StageContext
) -> tuple[Path, dict[str, JsonValue], float]:
    """Fetch the inputs and run the stage, or the part of its ranks that belongs to this node.

    Returns:
        Folder of the outputs, what the stage returned, and the seconds in the stage's own code.
    """
    os.environ["OMP_NUM_THREADS"] = str(context.placement.threads)
    paths = {
        name: [store.fetch(digest) for digest in value] if isinstance(value, list) else store.fetch(value)
        for name, value in inputs.items()
        if value
    }
    fault_point("stage.fetched")
    out = context.scratch / "out"
    for name in stage.outputs:
        (out / name).mkdir(parents=True)
    as_ranks = context.placement.num_ranks > 1 or context.placement.offload  # FSDP offloads, that of one rank too
    work = functools.partial(run_ranks, stage, (store, key)) if as_ranks else load_entry(stage.entry)
    began = time.monotonic()
    try:
        result = work(config, context=context, out=out, **paths)
    finally:
        context.resume.wait()
    return out, result, time.monotonic() - began


def _store_outputs(stage: Stage, out: Path, store: Store) -> dict[str, str]:
    """Digest of each output folder that the stage filled; an empty folder is no output."""
    return {
        name: store.put_folder(out / name, output.kind).digest
        for name, output in stage.outputs.items()
        if any((out / name).iterdir())
    }


def _record(
    stage: Stage,
    config: Config,
    inputs: Digests,
    key: str,
    outputs: dict[str, str],
    result: dict[str, JsonValue],
) -> StageRecord:
    """The record of a computation: code, configuration, inputs, outputs."""
    code, libraries = code_digest(stage.entry)
    return StageRecord(
        key=key,
        stage=stage.name,
        config=config.canonical(),
        code=code,
        libraries=libraries,
        inputs={name: value for name, value in inputs.items() if value},
        device=_measured_on(stage, config, inputs),
        outputs=outputs,
        result=result,
    )


class _Stop:
    """Whether the stage was asked to stop; long loops poll it."""

    def __init__(self) -> None:
        self.requested = self.polled = self.closed = False

    def __call__(self) -> bool:
        """Whether a signal has arrived."""
        self.polled = True
        return self.requested

    def close(self) -> None:
        """Ignore signals from here on: all that is left is to clean up, and to say how the stage has ended."""
        self.closed = True

    def handle_signal(self, signum: int, frame: FrameType | None) -> None:
        """Interrupt at once on a second signal, or if the stage does not poll: then it has no checkpoint to save."""
        if self.closed:
            return
        at_once, self.requested = self.requested or not self.polled, True
        if at_once:
            self.close()
            raise Interrupted


@contextlib.contextmanager
def stop_signals() -> Iterator[_Stop]:
    """Turn SIGTERM and SIGINT into a flag that long loops poll; within another such block, it is that one's flag."""
    outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(outer, _Stop):
        yield outer
        return
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.handle_signal) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _noting(reporter: Reporter) -> Callable[[str], None]:
    """A function that reports one sentence to the user."""
    return lambda text: reporter.emit({"type": "note", "time": time.time(), "text": text})


def failure_event(message: str, hint: str | None, exit_code: int) -> dict[str, object]:
    """The event with the reason why a stage failed."""
    return {"type": "failed", "time": time.time(), "error": message, "hint": hint, "exit_code": exit_code}
