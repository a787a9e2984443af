"""The process that `vllm_server.Server` starts: vLLM's OpenAI server, quicker to start, and never left alone.

    python -m components.core.vllm_launch PARENT_PID --model FOLDER …

Three things differ from vLLM's own entry point. On a CPU the engine is forked from this process instead of importing
everything anew, packages that transformers imports only because they are there stay out, and the process group ends with
the process that asked for it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time

UNUSED_PACKAGES = ("sklearn", "pandas", "scipy")
"""transformers and vLLM import these if they can, for features that serving text never uses."""

WATCH_INTERVAL_S = 0.5


def main() -> None:
    """Serve until told to stop, or until the parent is gone."""
    parent, *arguments = sys.argv[1:]
    sys.argv[1:] = arguments
    end_with_parent(int(parent))
    for package in UNUSED_PACKAGES:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    fork_the_engine()

    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


def end_with_parent(parent: int) -> None:
    """Kill this process group as soon as `parent` is no longer our parent.

    Asking the kernel for a signal (PR_SET_PDEATHSIG) would tie the server to the thread that started it, not to the process.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_INTERVAL_S)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def fork_the_engine() -> None:
    """Fork the engine process on a CPU too, where vLLM insists on spawning it.

    A spawned engine imports vLLM a second time, which takes longer than everything else it does to start.
    """
    from vllm.platforms import current_platform
    from vllm.v1.engine import utils

    if current_platform.is_cpu():
        utils.get_mp_context = lambda: multiprocessing.get_context("fork")


if __name__ == "__main__":
    main()
