"""Tasks of lm-eval on the model that a server serves: standard benchmarks by name, and task files of the user's."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from components.core.base.errors import DataError, InputError, MissingPackage, StageFailed
from components.core.serving.server import Server
from components.core.serving.settings import inherited_environment
from components.core.text.tokenizer import plain_prompt_ids
from components.eval.answer_rows import PromptMode
from components.eval.answers import TaskResults
from components.eval.client import SERVED_NAME, TIMEOUT_S
from components.eval.config import EvalConfig

PROGRAM = "components.eval.lm_eval_process"
OFFLINE = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")}
POLL_S = 0.2
LAST_LINES = 12
UNKNOWN_TASK = "is not a registered task"
ABSENT_DATA = (
    "OfflineModeIsEnabled",
    "Couldn't reach",
    "Couldn't find",
    "FileNotFoundError",
    "LocalEntryNotFoundError",
)


def require_lm_eval() -> None:
    """Raise MissingPackage unless lm-eval is installed."""
    if find_spec("lm_eval") is None:
        raise MissingPackage("eval.tasks needs lm-eval, which is not installed", hint="pip install 'tessera[tasks]'")


def run_tasks(
    server: Server,
    folder: Path,
    names: Sequence[str],
    modes: Sequence[PromptMode],
    config: EvalConfig,
    task_files: Path | None,
    log: Path,
    on_wait: Callable[[], None],
) -> TaskResults:
    """Run tasks on the model that a server serves.

    Args:
        server: a running server.
        folder: the served model, whose tokenizer cuts texts into tokens.
        names: of tasks or groups of tasks.
        modes: prompt modes of the model, for tasks that let it generate.
        config: limits.
        task_files: folder with task files of the user's and their data, None where there are none.
        log: file for lm-eval's messages.
        on_wait: called about five times a second; an exception from it ends the tasks.

    Raises:
        InputError: a task is unknown.
        DataError: data of a task is not on this machine.
        StageFailed: lm-eval failed in another way.
    """
    out = log.with_suffix(".json")
    request = {
        "url": server.url,
        "model": SERVED_NAME,
        "folder": str(folder),
        "tasks": list(names),
        "modes": list(modes),
        "begins": plain_prompt_ids(folder, [""])[0],
        "task_files": None if task_files is None else str(task_files),
        "num_problems": config.num_problems,
        "max_tokens": config.max_tokens,
        "max_model_len": server.max_model_len,
        "concurrency": config.concurrency,
        "timeout_s": TIMEOUT_S,
        "out": str(out),
    }
    status = _run_process(json.dumps(request), log, on_wait)
    if status:
        raise _failure(log.read_text(encoding="utf-8", errors="replace"), names)
    found = json.loads(out.read_text(encoding="utf-8"))
    return TaskResults(found["results"], found["samples"])


def _run_process(request: str, log: Path, on_wait: Callable[[], None]) -> int:
    """Run the program to its end; returns its exit status."""
    with log.open("wb") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM],
            env={**inherited_environment(), **OFFLINE},
            stdin=subprocess.PIPE,
            stdout=messages,
            stderr=messages,
        )
    assert process.stdin is not None
    try:
        process.stdin.write(request.encode())
        process.stdin.close()
        while process.poll() is None:
            on_wait()
            time.sleep(POLL_S)
    finally:
        process.kill()
        process.wait()
    return process.returncode


def _failure(log: str, names: Sequence[str]) -> DataError | InputError | StageFailed:
    """What `run_tasks` raises when lm-eval ended with an error."""
    last = "\n".join(log.splitlines()[-LAST_LINES:])
    if UNKNOWN_TASK in last:
        return InputError(
            f"eval.tasks: {last.splitlines()[-1]}",
            hint="`lm-eval ls tasks` lists its own; those of yours are in the folder eval.task_files",
        )
    if any(sign in last for sign in ABSENT_DATA):
        return DataError(
            f"data of {', '.join(names)} is not on this machine, and eval downloads nothing:\n{last}",
            hint="fill the cache of `datasets` before (HF_DATASETS_CACHE), or give a folder with it in eval.task_files",
        )
    return StageFailed(f"lm-eval could not run {', '.join(names)}:\n{last}")
