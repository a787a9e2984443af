"""The process that runs a pipeline with kfp.local: `python -m pipelines.run.executor ORDER`.

It has a process group of its own, so that a run ends as a whole; its output, KFP's chatter included, is the run's log.
"""

import functools
import getpass
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from components.core.base.errors import InputError
from components.core.base.processes import on_stdin_eof, terminate_gracefully
from components.core.base.scratch_dir import workspace
from components.core.runtime.kfp_task import GRACE_S, HELD
from pipelines.recipe.kfp_pipeline import build_pipeline
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import Recipe


def main(order_file: Path) -> None:
    """Run the pipeline that the order describes."""
    from kfp import local

    order = json.loads(order_file.read_text(encoding="utf-8"))
    signal.signal(signal.SIGTERM, _leave)
    on_stdin_eof(functools.partial(terminate_gracefully, GRACE_S))
    os.environ[HELD] = "1"
    graph = llama_nemotron(Recipe.parse(order["recipe"]))
    pipeline = build_pipeline(graph, order["sources"], known=order["known"])
    with workspace(_temporary(), str(os.getpid())) as root:
        # KFP and torchrun leave files behind that this block removes; in a short path, since sockets are among them.
        # What torch has compiled stays.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
        os.environ["TMPDIR"] = tempfile.tempdir = str(root)
        # A virtual environment of its own for each task would install KFP anew; everything a stage needs is in ours.
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root))
        pipeline(store=order["store"], run=order["run"])


def _temporary() -> Path:
    """A folder for temporary files that is this user's own."""
    folder = Path(tempfile.gettempdir()) / f"tessera-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise InputError(f"{folder} belongs to somebody else", hint="set TMPDIR to a folder of your own")
    return folder


def _leave(signum: int, frame: FrameType | None) -> None:
    """End without starting another task; the tasks themselves got the same signal and save what they need."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
