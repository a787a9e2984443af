"""A real Prometheus on loopback, which reads pages of this process."""

import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.core.base.ports import usable_port
from tests.waiting import wait_until

BINARY, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(BINARY is None, reason="needs prometheus, of Debian's package of that name")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus")


class Prometheus:
    """A client of its API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def is_ready(self) -> bool:
        """Whether it answers queries."""
        try:
            urllib.request.urlopen(f"{self._url}/-/ready", timeout=30).close()
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The series or the number that a query has as its result now.

        Raises:
            ValueError: it does not parse, or cannot be computed.
        """
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/query?{query}", timeout=60) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{expression}: {json.load(error).get('error')}") from None
        return found


@contextlib.contextmanager
def running_prometheus(folder: Path, targets: Mapping[int, Mapping[str, str]]) -> Iterator[Prometheus]:
    """Prometheus during the block.

    Args:
        folder: takes its data and its log.
        targets: for each port of this machine that it reads, the labels that a monitor of pods would add.
    """
    assert BINARY is not None
    jobs = [{"targets": [f"127.0.0.1:{port}"], "labels": dict(labels)} for port, labels in targets.items()]
    config = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
        "scrape_configs": [{"job_name": "pods", "static_configs": jobs}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = usable_port(None)
    command = [BINARY, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        client = Prometheus(port)
        wait_until("Prometheus comes up", lambda: client.is_ready() or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield client
    finally:
        process.terminate()
        process.wait()
