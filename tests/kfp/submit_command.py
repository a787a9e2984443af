"""`tessera submit` and `tessera run` as commands, with the environment's settings."""

import subprocess
import sys
from pathlib import Path


class SubmitCommand:
    """Submits one recipe, in a store of its own."""

    def __init__(self, recipe: Path, store: str) -> None:
        self.recipe, self.store = recipe, store

    def __call__(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the command until it ends."""
        return tessera("submit", str(self.recipe), "--store", self.store, *options)


def tessera(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Tessera until it ends."""
    return subprocess.run([sys.executable, "-m", "pipelines", *arguments], capture_output=True, text=True, check=False)
