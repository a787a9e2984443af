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

    Raises:
        SystemExit: pip could not install them.
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
        if subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit(f"pip could not install {', '.join(packages)}: this needs PyPI; what pip says stands above")
        done.write_text(wanted, encoding="utf-8")
    return python


def run_beside(name: str, packages: tuple[str, ...], module: str, *arguments: str) -> None:
    """Run a module of this tree in a process that has the packages of an environment in its path too.

    Args:
        name: of the environment.
        packages: with their versions.
        module: run as a program.
        arguments: of the program.

    Raises:
        SystemExit: it failed.
    """
    site = next((environment(name, *packages).parents[1] / "lib").glob("python*/site-packages"))
    path = os.pathsep.join([os.environ.get("PYTHONPATH", "."), str(site)])
    command = [sys.executable, "-m", module, *arguments]
    status = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
    if status:
        sys.exit(status)
