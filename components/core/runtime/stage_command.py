"""The command line of one stage, the same for a container on a cluster and for a process on this machine.

    python -m components.core.runtime.stage_command components.sft.config:STAGE --config JSON --store URI
        --run NAME --label LABEL --input model DIGEST --output tuned FILE … --executor-input JSON

On a cluster, a stage of several nodes has three kinds of pods that run this: that of its task watches a `TrainJob`, the
first of the `TrainJob` computes the stage, and the others run ranks for it (`multi_node`).

Inputs are named by digest. The digest of each output is written to the file that `--output` names, empty where the
stage made no such output. On a cluster, KFP's executor input says where metrics, pages and models go. Exit codes: 0
done, 1 the work failed, 2 wrong use or input, 130 stopped, with a checkpoint saved where the stage has them.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from components.core.base.config import Config
from components.core.base.errors import RecipeError, StageFailed, TesseraError
from components.core.base.processes import on_exit_of, terminate_gracefully
from components.core.runtime.context import Interrupted
from components.core.runtime.event_mirror import mirrored_events
from components.core.runtime.kfp_outputs import ExecutorInput, show_stage, write_failure
from components.core.runtime.multi_node.train_job import MANIFEST, run_on_nodes
from components.core.runtime.multi_node.training_node import run_other_node, stopped_without_watcher
from components.core.runtime.placement import Placement
from components.core.runtime.refusals import answer_retries
from components.core.runtime.runner import (
    INTERRUPTED_EXIT_CODE,
    STOP_SIGNALS,
    Digests,
    events_path,
    run_stage,
    stage_key,
    stop_signals,
)
from components.core.runtime.stage import Stage, item_label
from components.core.runtime.torchrun import node_rank
from components.core.store.store import StageRecord, Store, open_store

RUNNER_PID = "TESSERA_RUNNER_PID"
"""Environment variable with the process id of the local runner; the stage stops when that process has ended."""
TRACKING_URI = "MLFLOW_TRACKING_URI"
"""Environment variable with the address of MLflow; metrics are sent there while the stage works."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}
"""Environment variables that a stage's process should start with. By default glibc gives every tensor of over 32 MiB
back to the kernel, which clears its pages again for the next one."""
METRICS_PORT = "TESSERA_METRICS_PORT"
"""Environment variable with the port at which Prometheus reads the metrics of a working stage."""
SENDER = "components.core.lineage.live_metrics"
"""The module that sends metrics to MLflow. It is above this package, and runs as a process of its own."""
SENDER_EXIT_S = 8.0
"""Longest time that the sender may take to end; it takes none where MLflow does not answer."""
GRACE_S = 60.0
"""Time that a stage has to save a checkpoint when its run ends or is stopped."""


def command_line(
    declaration: str, values: Mapping[str, str], inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> list[str]:
    """The arguments that follow the Python interpreter; every value may be a placeholder that KFP fills in.

    Args:
        declaration: `module:name` of the stage.
        values: `config` and `placement` as JSON, `store`, `run`, `label`; `shard` for an item of a fan-out;
            `retries` and `executor-input` on a cluster.
        inputs: a digest, or a JSON list of digests, by the name of the input; empty for an input that is absent.
        outputs: the file that takes the digest, by the name of the output.
    """
    arguments = ["-m", "components.core.runtime.stage_command", declaration]
    for name, value in values.items():
        arguments += [f"--{name}", value]
    for name, digest in inputs.items():
        arguments += ["--input", name, digest]
    for name, file in outputs.items():
        arguments += ["--output", name, file]
    return arguments


def load_declaration(declaration: str) -> Stage:
    """The stage behind `module:name`."""
    module, _, name = declaration.partition(":")
    stage: Stage = getattr(importlib.import_module(module), name)
    return stage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage that the command line describes; returns the exit code."""
    options = _parser().parse_args(arguments)
    if RUNNER_PID in os.environ:
        on_exit_of(int(os.environ[RUNNER_PID]), functools.partial(terminate_gracefully, GRACE_S))
    with stop_signals() as stopping:
        try:
            with contextlib.closing(stopping):
                _run(options)
        except TesseraError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            write_failure(error)
            return error.exit_code
        except OSError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            write_failure(StageFailed(str(error)))
            return 1
        except Interrupted:
            sys.stderr.write("stopped; the same command goes on from here\n")
            return INTERRUPTED_EXIT_CODE
    return 0


def _run(options: argparse.Namespace) -> None:
    """Run the stage and write the digest of each output."""
    stage = load_declaration(options.declaration)
    settings, label = _json(options.config, "--config"), options.label or stage.name
    if options.shard:
        settings["shard"] = options.shard
        label = item_label(label, options.shard.partition("/")[0])
    config, inputs, store = (
        stage.config.parse(settings, where=label),
        _digests(options.input),
        open_store(options.store),
    )
    executor_input = ExecutorInput(options.executor_input) if options.executor_input else None
    placement = Placement.parse(_json(options.placement, "--placement"), where=f"{label}.placement")
    if node_rank():
        run_other_node(stage, config, inputs, store=store, placement=placement)
        return
    refusal = f"runs/{options.run}/refusals/{label}/{stage_key(stage, config, inputs)}.json"
    with answer_retries(store, refusal, options.retries):
        if MANIFEST in os.environ:
            command = [sys.executable, *_node_command(options)]
            record = run_on_nodes(stage, config, inputs, store=store, run=options.run, label=label, command=command)
        else:
            record = _run_here(stage, config, inputs, store, label, options.run, placement)
    for name, file in options.output:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.outputs.get(name, ""), encoding="utf-8")
    if executor_input is not None:
        show_stage(executor_input, stage, record, store, label, os.environ.get(TRACKING_URI))


def _run_here(
    stage: Stage, config: Config, inputs: Digests, store: Store, label: str, run: str | None, placement: Placement
) -> StageRecord:
    """Run the stage in this process; on several nodes, this is the first."""
    with contextlib.ExitStack() as stack:
        if node_rank() == 0 and run is not None:
            stack.enter_context(stopped_without_watcher(store, run, label))
        mirror = stack.enter_context(mirrored_events(store, run, label))
        if run is not None and (port := os.environ.get(METRICS_PORT)):
            from components.core.runtime.monitoring.exposition import served_metrics  # its library loads slowly

            stack.enter_context(served_metrics(int(port), events_path(store, run, label), run, label, mirror))
        stack.enter_context(_live_metrics(store, run, label))
        return run_stage(stage, config, inputs, store=store, label=label, run=run, placement=placement)


def _node_command(options: argparse.Namespace) -> list[str]:
    """The arguments of each node of a stage: those of its task, without what the task alone writes and answers."""
    names = ("config", "placement", "store", "run", "label", "shard")
    values = {name: value for name in names if (value := getattr(options, name))}
    return command_line(options.declaration, values, dict(options.input), {})


@contextlib.contextmanager
def _live_metrics(store: Store, run: str | None, label: str) -> Iterator[None]:
    """Let a process send the metrics of this attempt to MLflow during the block, where MLflow's address is set."""
    if run is None or not os.environ.get(TRACKING_URI):
        yield
        return
    events = events_path(store, run, label)
    offset = events.stat().st_size if events.exists() else 0
    command = [sys.executable, "-m", SENDER, store.uri, run, label, str(offset)]
    with contextlib.ExitStack() as stack:
        try:
            sender = subprocess.Popen(command, stdin=subprocess.PIPE)
            stack.callback(_end_sender, sender)
        except OSError as error:
            sys.stderr.write(f"metrics are sent to MLflow at the end of the run: {error}\n")
        yield


def _end_sender(sender: "subprocess.Popen[bytes]") -> None:
    """Say that the stage has ended, and wait while the last batch is sent."""
    try:
        sender.communicate(b"\n", timeout=SENDER_EXIT_S)
    except subprocess.TimeoutExpired:
        sender.kill()
        sender.wait()


def _digests(inputs: Sequence[Sequence[str]]) -> Digests:
    """Digests by input; an absent input is left out."""
    digests = {name: json.loads(value) if value.startswith("[") else value for name, value in inputs}
    return {name: [one for one in v if one] if isinstance(v, list) else v for name, v in digests.items() if v}


def _json(text: str, option: str) -> dict[str, object]:
    """The JSON object of an option.

    Raises:
        RecipeError: the text is no JSON object.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{option} is no JSON: {error}", hint="quote the text for the shell") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{option} is {text[:40]!r}, no JSON object")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m components.core.runtime.stage_command",
        description="Run one stage on artifacts of a store; `tessera stage` takes files of your own.",
    )
    parser.add_argument("declaration", metavar="MODULE:NAME", help="the stage, e.g. components.sft.config:STAGE")
    parser.add_argument("--config", default="{}", metavar="JSON", help="the stage's settings")
    parser.add_argument("--placement", default="{}", metavar="JSON", help="processes, threads, gpus")
    parser.add_argument("--store", default=".tessera", metavar="URI", help="folder or s3://bucket/prefix")
    parser.add_argument("--run", metavar="NAME", help="the run that the stage belongs to")
    parser.add_argument("--label", help="the stage's role in the run; its name by default")
    parser.add_argument("--shard", default="", metavar="I/N", help="the item of a fan-out")
    parser.add_argument(
        "--retries", type=int, default=0, metavar="N", help="how often the cluster starts this again after a failure"
    )
    parser.add_argument("--executor-input", metavar="JSON", help="where KFP takes metrics, pages and models from")
    parser.add_argument(
        "--input", nargs=2, action="append", default=[], metavar=("NAME", "DIGEST"), help="digest or JSON list of them"
    )
    parser.add_argument(
        "--output", nargs=2, action="append", default=[], metavar=("NAME", "FILE"), help="file for the output's digest"
    )
    return parser


if __name__ == "__main__":
    status = main()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the exit code tells how the stage has ended, and Python is not gone yet
    sys.exit(status)
