"""The part of the lock that each image installs: what its extra of the project needs, without tools of development."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from infra.lock import LEFT_OUT, ROOT, lock_entries

Device = Literal["cpu", "gpu"]
IMAGES = ("core", "train", "serve")
"""Each image has what the one before it has."""

NOT_NEEDED = re.compile(r"intel-cmplr-lib-ur==")
"""For Intel's GPUs. Only some wheels of intel-openmp ask for it, so the lock, which is for all of them, has none."""


def extra(image: str, device: Device) -> str:
    """The extra of the project that an image installs; core runs the operator too."""
    return {"core": "operator", "train": "train", "serve": "serve" if device == "cpu" else "serve-gpu"}[image]


def lock_part(image: str, device: Device) -> list[str]:
    """Entries of the device's lock, with their hashes, that an image needs beside torch."""
    lock = ROOT / f"requirements-{device}.lock"
    return select_entries(lock.read_text(encoding="utf-8"), _resolve(extra(image, device), lock))


def select_entries(lock: str, requirements: Iterable[str]) -> list[str]:
    """The entries of a lock for requirements in the form `name==version`; torch and its libraries have none.

    Raises:
        ValueError: the lock has another version of a package, or does not have it.
    """
    entries = {entry.split(maxsplit=1)[0]: entry for entry in lock_entries(lock)}
    needed = (requirement for requirement in requirements if not LEFT_OUT.match(requirement))
    wanted = [requirement for requirement in needed if not NOT_NEEDED.match(requirement)]
    if missing := [requirement for requirement in wanted if requirement not in entries]:
        raise ValueError(f"not in the lock: {', '.join(missing)}; renew it with `make lock`")
    return [entries[requirement] for requirement in wanted]


def _resolve(extra: str, lock: Path) -> list[str]:
    """What the project with an extra needs, as `name==version`, with the versions of the lock."""
    command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "pyproject.toml", "--extra", extra]
    command += [
        "--constraint",
        str(lock),
        "--python-version",
        "3.11",
        "--no-annotate",
        "--no-header",
        "--no-emit-index-url",
        "--quiet",
    ]
    text = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return re.findall(r"^[a-z0-9][^\s;]*", text, re.MULTILINE)
