"""Renews the lock files: one for machines without a GPU, one for NVIDIA GPUs, and what reasoning-gym needs besides.

torch and the CUDA libraries that only a CUDA build of it needs stay out: the installer takes torch first, as the
build that the machine offers, and its libraries come with it. A package that reasoning-gym needs is compiled where it
is installed, so its part is a file of its own: a machine without a C compiler installs the rest.
`--upgrade` takes the newest versions of everything.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADER = "# Every package but torch and its CUDA libraries, pinned with hashes. Renew with `make lock`.\n"
REASONING = ROOT / "requirements-reasoning.lock"
LEFT_OUT = re.compile(
    r"(torch|triton|nvidia-(cublas|cuda|cudnn|cufft|cufile|curand|cusolver|cusparse|nccl|nvjitlink|nvshmem|nvtx)\S*|cuda-(bindings|pathfinder|toolkit))=="
)


def lock(extra: str, target: Path, *, upgrade: bool) -> list[str]:
    """Resolve the project with one set of extras and write what is pinned; versions stay where they still fit.

    Returns:
        The entries that only the extra `reasoning` needs, which are not written. All others fit beside them.
    """
    pinned = [entry for file in (target, REASONING) if file.exists() for entry in lock_entries(file.read_text())]
    whole = _resolve((extra, "dev", "reasoning"), [] if upgrade else pinned)
    without = {_name(entry) for entry in _resolve((extra, "dev"), whole)}
    _write(target, [entry for entry in whole if _name(entry) in without])
    return [entry for entry in whole if _name(entry) not in without]


def _resolve(extras: Sequence[str], pinned: Sequence[str]) -> list[str]:
    """Entries of all packages that the project needs with some extras; versions of `pinned` stay where they fit."""
    command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "pyproject.toml"]
    command += [argument for extra in extras for argument in ("--extra", extra)]
    command += ["--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--no-emit-index-url", "--no-annotate", "--no-header", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requirements.lock")
        if pinned:
            file.write_text("\n".join(pinned) + "\n", encoding="utf-8")
        subprocess.run([*command, "--output-file", str(file)], cwd=ROOT, check=True)
        return lock_entries(file.read_text(encoding="utf-8"))


def _write(target: Path, entries: Sequence[str]) -> None:
    target.write_text(HEADER + "\n".join(entry for entry in entries if not LEFT_OUT.match(entry)) + "\n")


def lock_entries(text: str) -> list[str]:
    """The entry of each package: its version, the machines that it is for, its hashes."""
    return re.split(r"\n(?=[a-z0-9])", text.removeprefix(HEADER).strip())


def _name(entry: str) -> str:
    return entry.partition("==")[0]


if __name__ == "__main__":
    upgrade = "--upgrade" in sys.argv[1:]
    cpu, gpu = (
        lock(extra, ROOT / f"requirements-{device}.lock", upgrade=upgrade)
        for extra, device in (("serve", "cpu"), ("serve-gpu", "gpu"))
    )
    if cpu != gpu:
        sys.exit("reasoning-gym would have other versions beside each lock: run it again, or pin what differs")
    _write(REASONING, cpu)
