"""A stage as several training processes under torchrun; rank 0 reports and writes the outputs."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from pydantic import JsonValue

from components.core import errors
from components.core.config import Config
from components.core.errors import StageFailed, TesseraError
from components.core.job import Interrupted, Job
from components.core.stage import Stage
from components.core.store import Store

POLL_S = 0.1
ORDER, RESULT, FAILURE = "order.json", "result.json", "failure-{}.json"
"""What the training processes are told, what rank 0 returned, and why a rank failed: files of the scratch folder."""


def run_ranks(
    stage: Stage, home: tuple[Store, str], config: Config, *, job: Job, out: Path, **paths: Path | list[Path]
) -> dict[str, JsonValue]:
    """Run a stage as `placement.processes` ranks, each of which calls its `run` with the same arguments.

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
        "resume": str(job.resume.folder),
        "home": [home[0].uri, str(home[0].local), home[1]],
        "placement": job.placement.model_dump(mode="json"),
    }
    (job.scratch / ORDER).write_text(json.dumps(order))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={job.placement.processes}", "-m", "components.core.worker", str(job.scratch)]
    # Its standard input is how the ranks learn of our end; a session of its own keeps the signals of our group from
    # it, since torchrun cannot take a second one while it ends the ranks for the first.
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process,
        _stopped_with(job, process),
    ):
        assert process.stdout is not None
        for line in process.stdout:  # rank 0 writes its events here, a line each
            with contextlib.suppress(ValueError):
                job.reporter.emit(json.loads(line))
    if process.returncode != 0:
        raise _failure(stage, job, process.returncode)
    result: dict[str, JsonValue] = json.loads((job.scratch / RESULT).read_text())
    return result


@contextlib.contextmanager
def _stopped_with(job: Job, process: "subprocess.Popen[str]") -> Iterator[None]:
    """Hand the wish to stop on to torchrun, which asks its ranks, once; where it has ended, end them."""
    done = threading.Event()

    def watch() -> None:
        asked = False
        while not done.wait(POLL_S) and process.poll() is None:
            if job.stopping() and not asked:
                process.terminate()
                asked = True
        if process.stdin is not None:
            process.stdin.close()  # ends ranks that torchrun left behind

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


def _failure(stage: Stage, job: Job, status: int) -> BaseException:
    """Why the ranks ended: what one of them raised that a user can act on, else what was raised first.

    A rank that was killed says nothing; torchrun then asks the others to stop, and those tell of that alone.
    """
    if job.stopping():
        return Interrupted()
    told = [json.loads(path.read_text()) for path in job.scratch.glob(FAILURE.format("*"))]
    reasons = [failure for failure in told if failure["type"] != Interrupted.__name__]
    for failure in sorted(reasons, key=lambda failure: (failure["exit_code"] is None, failure["time"])):
        kind = getattr(errors, failure["type"], None)
        if isinstance(kind, type) and issubclass(kind, TesseraError):
            return kind(failure["message"], hint=failure["hint"])
        return StageFailed(f"{stage.name} stopped: {failure['type']}: {failure['message']}")
    return StageFailed(
        f"{stage.name}: a training process was killed, and said nothing; torchrun ended with status {status}",
        hint="where memory ran out, smaller batches or fewer processes help; the same command goes on from here",
    )
