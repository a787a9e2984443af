"""The process that starts vLLM's OpenAI servers, quickly and as often as asked.

    python -m components.core.serving.launch PARENT_PID

Most of the time that a server takes to start goes into importing vLLM. This process does it once, then forks a server
for each line that it reads: a JSON object with `arguments` (of the server), `environment`, `threads` and `log`. It
answers each with the process id. Every process ends with the one that asked for it, however that ends.
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from components.core.base.processes import end_with_parent

UNUSED_PACKAGES = ("boto3", "opentelemetry", "pandas", "scipy", "sklearn", "trio")
"""Imported by what we import if they can be, for features that serving a local folder never uses."""

PRELOADED_MODULES = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.generate.api_router",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_worker",
)
"""What a server would import after the fork, for each start anew."""


def main() -> None:
    """Fork servers until there is nobody left to ask for one."""
    end_with_parent(int(sys.argv[1]))
    import_vllm()
    signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # no zombies: whoever asks whether a server lives gets a straight answer
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            serve(order)
        print(pid, flush=True)  # noqa: T201


def import_vllm() -> None:
    """Import what every server needs, without what none needs, and make its engine a fork."""
    for package in UNUSED_PACKAGES:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    gc.disable()  # collections while importing find nothing, and take a fifth of the time
    for module in PRELOADED_MODULES:
        importlib.import_module(module)
    importlib.import_module("vllm.plugins").load_general_plugins()
    _fork_engines()
    gc.freeze()
    gc.enable()


def serve(order: Mapping[str, Any]) -> NoReturn:
    """Become a server, in a process group of its own; never returns."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    end_with_parent(os.getppid())
    os.register_at_fork(after_in_child=lambda: end_with_parent(os.getppid()))  # the engine ends with the server
    os.environ.update(order["environment"])

    import torch
    from vllm.entrypoints.launchers.api_server.entry import main as serve_until_told_to_stop

    torch.set_num_threads(order["threads"])
    sys.argv = ["vllm", *order["arguments"]]
    serve_until_told_to_stop()
    sys.exit()


def _fork_engines() -> None:
    """Fork the engine process on a CPU too, where vLLM insists on spawning it and thereby on importing all anew."""
    from vllm.platforms import current_platform
    from vllm.v1.engine import utils

    if current_platform.is_cpu():
        importlib.import_module("vllm.v1.worker.cpu_worker")
        utils.get_mp_context = lambda: multiprocessing.get_context("fork")


if __name__ == "__main__":
    main()
