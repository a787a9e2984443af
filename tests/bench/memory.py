"""Memory that a command takes with all processes that it starts: `python -m tests.bench.memory COMMAND …`.

Proportional set sizes are added up, so that pages that processes share count once. Processes are found by an entry in
their environment, which all inherit, so that those in sessions of their own count too.
"""

import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

INTERVAL_S = 2.0
MARKER = "TESSERA_MEMORY_OF"


def main() -> None:
    """Run the command, and print the peak of its memory."""
    status, peak = run_measured(sys.argv[1:])
    print(f"at most {peak / 2**30:.2f} GiB in all processes together")  # noqa: T201
    sys.exit(status)


def run_measured(command: Sequence[str]) -> tuple[int, int]:
    """Run a command, look every two seconds, and return its status and the highest sum in bytes."""
    marker = uuid.uuid4().hex
    process = subprocess.Popen(command, env={**os.environ, MARKER: marker})
    peak = 0
    while True:
        peak = max(peak, sum(_pss_bytes(path, marker) for path in Path("/proc").glob("[0-9]*")))
        try:
            return process.wait(INTERVAL_S), peak
        except subprocess.TimeoutExpired:
            continue


def _pss_bytes(process: Path, marker: str) -> int:
    """Memory of a process; 0 of one that the command did not start, or that has ended."""
    try:
        if marker.encode() not in (process / "environ").read_bytes():
            return 0
        lines = (process / "smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


if __name__ == "__main__":
    main()
