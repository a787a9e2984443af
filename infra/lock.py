"""Renews the lock files: one for machines without a GPU, one for NVIDIA GPUs.

torch and the CUDA libraries that only a CUDA build of it needs stay out: the installer takes torch first, as the
build that the machine offers, and its libraries come with it. `--upgrade` takes the newest versions of everything.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADER = "# Every package but torch and its CUDA libraries, pinned with hashes. Renew with `make lock`.\n"
LEFT_OUT = re.compile(
    r"(torch|triton|nvidia-(cublas|cuda|cudnn|cufft|cufile|curand|cusolver|cusparse|nccl|nvjitlink|nvshmem|nvtx)\S*|cuda-(bindings|pathfinder|toolkit))=="
)


def lock(extra: str, target: Path, *, upgrade: bool) -> None:
    """Resolve the project with one set of extras and write what is pinned; versions stay where they still fit."""
    command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "pyproject.toml", "--extra", extra]
    command += ["--extra", "dev", "--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--no-emit-index-url", "--no-annotate", "--no-header", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder, target.name)
        if not upgrade:
            shutil.copy(target, pinned)
        subprocess.run([*command, "--output-file", str(pinned)], cwd=ROOT, check=True)
        text = pinned.read_text(encoding="utf-8")
    kept = [entry for entry in lock_entries(text) if not LEFT_OUT.match(entry)]
    target.write_text(HEADER + "\n".join(kept) + "\n")


def lock_entries(text: str) -> list[str]:
    """The entry of each package: its version, the machines that it is for, its hashes."""
    return re.split(r"\n(?=[a-z0-9])", text.removeprefix(HEADER).strip())


if __name__ == "__main__":
    upgrade = "--upgrade" in sys.argv[1:]
    lock("serve", ROOT / "requirements-cpu.lock", upgrade=upgrade)
    lock("serve-gpu", ROOT / "requirements-gpu.lock", upgrade=upgrade)
