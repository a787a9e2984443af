"""The environments of the programs that Tessera is measured against: made once, kept in a cache folder."""

import os
import subprocess
import sys
import venv
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tessera" / "bench"


def environment(name: str, *packages: str) -> Path:
    """The Python of an environment that has exactly these packages, without what they ask for.

    Args:
        name: of its folder in the cache.
        packages: with their versions.
    """
    folder = CACHE / name
    python, done = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(packages)
    if not done.exists() or done.read_text(encoding="utf-8") != wanted:
        venv.create(folder, with_pip=True, clear=True)
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            *packages,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        done.write_text(wanted, encoding="utf-8")
    return python
