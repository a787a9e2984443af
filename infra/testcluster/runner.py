"""Starts services, waits until they are ready, and stops them; it ends no process that it did not start itself."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

from infra.testcluster.layout import Layout, TestClusterError
from infra.testcluster.network import without_proxies
from infra.testcluster.services import Command, Service

POLL_S = 0.2
LOG_LINES = 15


class Runner:
    """The services of one layout. A service's record names its process by number and start time."""

    def __init__(self, layout: Layout, programs: Iterable[Path]) -> None:
        self._layout = layout
        path = os.pathsep.join([*map(str, programs), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        self._environment = without_proxies({**os.environ, "PATH": path, "KUBECONFIG": str(layout.kubeconfig)})

    def start(self, service: Service) -> None:
        """Start a service and wait until it is ready; one that runs already is only waited for.

        Raises:
            TestClusterError: it ends, or is not ready in time; the message has the end of its log.
        """
        if self.process(service) is None:
            self._prepare(service)
            for command in service.before:
                self._repeat(command, service, started=False)
            self._launch(service)
        if service.ready_url:
            self._wait(
                lambda: _answers(service.ready_url), service, f"{service.ready_url} does not answer", started=True
            )
        for command in service.after:
            self._repeat(command, service, started=True)

    def stop(self, service: Service) -> None:
        """End a service: SIGTERM, and SIGKILL after its grace period."""
        process = self.process(service)
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(service.grace_period_s)
                except psutil.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._record(service).unlink(missing_ok=True)
        for link in service.links:
            if link.is_symlink():
                link.unlink()

    def process(self, service: Service) -> psutil.Process | None:
        """The service's process, or None where it does not run."""
        try:
            record = json.loads(self._record(service).read_text())
            process = psutil.Process(record["pid"])
            same = process.create_time() == record["created"] and process.status() != psutil.STATUS_ZOMBIE
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None
        return process if same else None

    def output(self, *command: str) -> str:
        """Run a command that belongs to the cluster and return what it prints, or nothing where it fails."""
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False).stdout

    def log(self, service: Service) -> Path:
        """The file that a service's output goes to."""
        return self._layout.state / "log" / f"{service.name}.log"

    def _record(self, service: Service) -> Path:
        return self._layout.state / "processes" / f"{service.name}.json"

    def _prepare(self, service: Service) -> None:
        """Write the service's files and links."""
        for path, text in service.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for link, target in service.links.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    def _launch(self, service: Service) -> None:
        """Start the process and record it."""
        self.log(service).parent.mkdir(parents=True, exist_ok=True)
        program = shutil.which(service.command[0], path=self._environment["PATH"])
        if program is None:
            raise TestClusterError(f"{service.command[0]} is not installed and not among the programs that were built")
        # A spawned process, other than a Popen object, may outlive the one that started it without a warning.
        pid = os.posix_spawn(
            program,
            service.command,
            {**self._environment, **service.environment},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log(service)), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        self._record(service).parent.mkdir(parents=True, exist_ok=True)
        created = psutil.Process(pid).create_time()
        self._record(service).write_text(json.dumps({"pid": pid, "created": created}))

    def _repeat(self, command: Command, service: Service, *, started: bool) -> None:
        """Run a command until it succeeds: an API server that has just started refuses some for a moment."""
        failures: list[str] = []

        def succeeds() -> bool:
            done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                failures.append(done.stderr.strip())
            return done.returncode == 0

        self._wait(succeeds, service, f"`{' '.join(command)}` fails", started=started, details=failures)

    def _wait(
        self,
        ready: Callable[[], bool],
        service: Service,
        problem: str,
        *,
        started: bool,
        details: Sequence[str] = (),
    ) -> None:
        """Wait until a service is ready; one that was started has to go on running."""
        deadline = time.monotonic() + service.patience_s
        while not ready():
            ended = started and self.process(service) is None
            if ended or time.monotonic() > deadline:
                state = "it has ended" if ended else f"not after {service.patience_s:g} s"
                lines = [
                    f"{service.name} is not ready ({state}):",
                    problem,
                    *details[-1:],
                    f"the end of {self.log(service)}:",
                    self._log_end(service),
                ]
                raise TestClusterError("\n".join(lines))
            time.sleep(POLL_S)

    def _log_end(self, service: Service) -> str:
        if not self.log(service).exists():
            return "(empty)"
        return "\n".join(self.log(service).read_text(errors="replace").splitlines()[-LOG_LINES:])


def raise_file_limit() -> None:
    """Let the processes open as many files as this user may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def say(text: str) -> None:
    """Print one line of progress."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
