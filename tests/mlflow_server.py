"""A real MLflow server, on the loopback interface by default, which can be killed and come back as it was."""

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from components.core.base.ports import usable_port
from tests.mlflow_database import new_database
from tests.waiting import wait_until


class MlflowServer:
    """A server on a database of its own."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.port = usable_port(None)
        self.host, self.uri = host, f"http://{host}:{self.port}"
        self.database = new_database(folder / "mlflow.db")
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start on the records of before, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", self.host, "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}"]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_until("MLflow answers", self._answers, interval_s=0.1, details=self._end_of_log)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._end_of_log()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{self.uri}/health", timeout=10).close()
            return True
        return False

    def _end_of_log(self) -> str:
        return (self._folder / "log").read_text()[-2000:]

    def kill(self) -> None:
        """End it as a power failure would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextlib.contextmanager
def running_mlflow(folder: Path, **options: str) -> Iterator[MlflowServer]:
    """A server while it is needed."""
    server = MlflowServer(folder, **options)
    try:
        server.start()
        yield server
    finally:
        server.kill()
