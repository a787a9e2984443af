"""vLLM as the chart starts it, on a tiny model: its limits, its defaults, and how it ends."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("vllm")

from components.core.base.ports import never_proxy_loopback, usable_port
from components.core.serving.first_token import API_KEY
from infra.chart import render
from tests.components.core import tiny_models
from tests.helm.cases import CASES
from tests.helm.test_serving import server
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.slow

KEY = "of-clients"
ROOT = Path(__file__).parents[2]


class Running:
    """The server's process and its address."""

    def __init__(self, folder: Path, log: Path) -> None:
        container = server(render(CASES["everything"]), "Deployment")
        self.port = usable_port(None)
        changed = {"--model": folder, "--port": self.port, "--max-model-len": 512, "--served-model-name": "nano"}
        given = [one for one in container["args"] if one.partition("=")[0] not in changed]
        arguments = [*given, *(f"{name}={value}" for name, value in changed.items())]
        own = {one["name"]: one["value"] for one in container["env"] if "value" in one and one["name"] != "HOME"}
        self.environment = {**os.environ, **own, API_KEY: KEY, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.probe = [sys.executable, *container["startupProbe"]["exec"]["command"][1:-2], str(self.port), "nano"]
        command = [sys.executable, *container["command"][1:], *arguments]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
        self.log = log

    def is_ready(self) -> bool:
        """Whether the startup probe of the chart succeeds."""
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        return subprocess.run(self.probe, env=self.environment, capture_output=True, check=False).returncode == 0

    def client(self) -> openai.OpenAI:
        """A client that knows the key."""
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A server of a model that answers `42`, thinking or not, by the mode."""
    never_proxy_loopback()
    thinking = ["<on>", "<think>", "6", "*", "7", "</think>", "4"]
    folder = tiny_models.write(tiny_models.speaker(thinking, ["<off>", "4", "2", "<eos>"]), tmp_path / "model")
    found = Running(folder, tmp_path / "log")
    try:
        wait_until("the server is ready", found.is_ready, details=lambda: found.log.read_text()[-3000:])
        yield found
    finally:
        if found.process.poll() is None:
            os.killpg(found.process.pid, signal.SIGKILL)
        found.process.wait()


def status_of_large_request(port: int, size: int) -> int:
    """Status of a request that says how large it is; the server answers before it has read the body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.putrequest("POST", "/v1/chat/completions")
        for name, value in {"Content-Length": str(size), "Authorization": f"Bearer {KEY}"}.items():
            connection.putheader(name, value)
        connection.endheaders(b"x" * 1000)
        return connection.getresponse().status
    finally:
        connection.close()


def test_it_keeps_the_limit_the_key_and_its_answers_until_the_end(running: Running) -> None:
    url = f"http://127.0.0.1:{running.port}/v1/chat/completions"
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    assert status_of_large_request(running.port, 2_000_000) == 413
    with pytest.raises(urllib.error.HTTPError) as unknown:
        urllib.request.urlopen(urllib.request.Request(url, b"{}", headers | {"Authorization": "Bearer other"}))
    with unknown.value as refused:
        assert refused.code == 401
    question: list[Any] = [{"role": "user", "content": "6*7="}]
    modes = {mode: [{"role": "system", "content": f"detailed thinking {mode}"}, *question] for mode in ("on", "off")}
    with running.client() as client:
        for mode, expected in (("on", "6*7"), ("off", None)):
            reply = client.chat.completions.create(model="nano", messages=modes[mode], max_tokens=16, temperature=0)
            assert (reply.choices[0].message.model_extra or {})["reasoning"] == expected
        pieces: list[str] = []
        first, ended = threading.Event(), threading.Event()

        def stream() -> None:
            options: dict[str, Any] = {"extra_body": {"ignore_eos": True}, "max_tokens": 400, "temperature": 0}
            for chunk in client.chat.completions.create(model="nano", messages=modes["off"], stream=True, **options):
                first.set()
                pieces.append(str(chunk.choices[0].finish_reason))
            ended.set()

        thread = threading.Thread(target=stream)
        thread.start()
        assert first.wait(PATIENCE_S)
        open_yet = not ended.is_set()
        running.process.terminate()
        thread.join(PATIENCE_S)
    assert open_yet, "the answer had ended before the server was told to"
    assert ended.is_set()
    assert pieces[-1] == "length"
    assert running.process.wait(PATIENCE_S) is not None
