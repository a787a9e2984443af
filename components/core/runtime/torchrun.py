"""A stage as several training processes under torchrun; rank 0 reports and writes the outputs."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from pydantic import JsonValue

from components.core.base import errors
from components.core.base.config import Config
from components.core.base.errors import StageFailed, TesseraError
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.stage import Stage
from components.core.store.store import Store

POLL_S = 0.1
ORDER, RESULT, FAILURE, CRASH = "order.json", "result.json", "failure-{}.json", "crash-{}.txt"
"""What the ranks are told, what rank 0 returned, why one failed, where one was when it crashed: files of the scratch
folder."""
MAX_CRASHES = 3
"""How often the processes are started before a crash of native code counts as the stage's failure."""


def run_ranks(
    stage: Stage,
    home: tuple[Store, str],
    config: Config,
    *,
    context: StageContext,
    out: Path,
    **paths: Path | list[Path],
) -> dict[str, JsonValue]:
    """Run a stage as `placement.processes` ranks, each of which calls its `run` with the same arguments.

    Where one of them crashes in native code (a signal such as SIGSEGV or SIGABRT, not an exception, nor one that was
    killed), which may be one time in thousands, all start again, from the last resume point.

    `home` is the store that resume points are copied to where it is remote, and the key that they have there.

    Raises:
        TesseraError: what the first rank that failed raised; StageFailed where it said nothing.
        Interrupted: the ranks were asked to stop, and have saved a resume point.
    """
    order = {
        "entry": stage.entry,
        "config_class": f"{type(config).__module__}:{type(config).__qualname__}",
        "config": config.model_dump(mode="json"),
        "inputs": {name: [str(p) for p in v] if isinstance(v, list) else str(v) for name, v in paths.items()},
        "out": str(out),
        "resume": str(context.resume.folder),
        "home": [home[0].uri, str(home[0].local), home[1]],
        "placement": context.placement.model_dump(mode="json"),
        "stage_pid": os.getpid(),
    }
    (context.scratch / ORDER).write_text(json.dumps(order))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        f"--nproc-per-node={context.placement.processes}",
        "-m",
        "components.core.runtime.rank_main",
        str(context.scratch),
    ]
    for attempt in range(1, MAX_CRASHES + 1):
        _start_afresh(stage, context.scratch, out)
        status = _torchrun(command, context)
        if status == 0:
            result: dict[str, JsonValue] = json.loads((context.scratch / RESULT).read_text())
            return result
        crash = _crash(context.scratch)
        if crash is None or context.stopping() or attempt == MAX_CRASHES:
            break
        context.note(f"{crash}; they start again from the last resume point")
    raise _failure(stage, context, status, crash)


def _start_afresh(stage: Stage, scratch: Path, out: Path) -> None:
    """Remove what an attempt before has left."""
    for path in (*scratch.glob(FAILURE.format("*")), *scratch.glob(CRASH.format("*"))):
        path.unlink()
    for name in stage.outputs:
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)


def _torchrun(command: list[str], context: StageContext) -> int:
    """Have all ranks do their work; returns the exit status."""
    # torchrun runs in its own session, since it cannot handle a second signal while it ends the ranks for the first.
    with (
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process,
        _stopped_with(context, process),
    ):
        assert process.stdout is not None
        for line in process.stdout:  # rank 0 writes its events here, a line each
            with contextlib.suppress(ValueError):
                context.reporter.emit(json.loads(line))
    return process.returncode


def _crash(scratch: Path) -> str | None:
    """Which rank crashed and how, in words; None where none did. Where it was then goes to the log."""
    for path in sorted(scratch.glob(CRASH.format("*"))):
        if where := path.read_text(errors="replace"):
            sys.stderr.write(where)
            return f"training process {path.stem.removeprefix('crash-')} crashed ({where.splitlines()[0]})"
    return None


@contextlib.contextmanager
def _stopped_with(context: StageContext, process: "subprocess.Popen[str]") -> Iterator[None]:
    """Hand a request to stop on to torchrun, once; torchrun asks its ranks."""
    done = threading.Event()

    def watch() -> None:
        asked = False
        while not done.wait(POLL_S) and process.poll() is None:
            if context.stopping() and not asked:
                process.terminate()
                asked = True

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        done.set()
        watcher.join()


def _failure(stage: Stage, context: StageContext, status: int, crash: str | None = None) -> BaseException:
    """Why the ranks ended: what one of them raised that a user can act on, else a crash, else what was raised first.

    A rank that was killed says nothing; torchrun then asks the others to stop, and those tell of that alone.
    """
    if context.stopping():
        return Interrupted()
    told = [json.loads(path.read_text()) for path in context.scratch.glob(FAILURE.format("*"))]
    reasons = sorted((one for one in told if one["type"] != Interrupted.__name__), key=lambda one: one["time"])
    for reason in reasons:
        kind = getattr(errors, reason["type"], None)
        if isinstance(kind, type) and issubclass(kind, TesseraError):
            return kind(reason["message"], hint=reason["hint"])
    if crash is not None:
        return StageFailed(f"{stage.name}: {crash}", hint="the log has where; the same command goes on from here")
    for reason in reasons:
        return StageFailed(f"{stage.name} stopped: {reason['type']}: {reason['message']}")
    return StageFailed(
        f"{stage.name}: a training process was killed, and said nothing; torchrun ended with status {status}",
        hint="where memory ran out, smaller batches or fewer processes help; the same command goes on from here",
    )
