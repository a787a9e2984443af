"""A stand-in for a vLLM server: the part of its API and its metrics that clients and the canary use, and no model.

`python -m tests.vllm_standin --model FOLDER --served-model-name NAME --port PORT`; other options of vLLM are taken and
ignored. The file `behaviour.json` in the folder says how the version behaves, see `Behaviour`; a bundle of a run has
none, see `behaviour_of`. At SIGTERM it accepts no new connection and finishes the open ones, as vLLM's web server does.
"""

import argparse
import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from components.core.base.metric_names import (
    VLLM_FIRST_TOKEN,
    VLLM_HTTP,
    VLLM_INTER_TOKEN,
    VLLM_RUNNING,
    VLLM_WAITING,
    Metric,
)

BEGIN_S = 0.05
"""Time until an answer begins. Traefik cuts one now and then whose first bytes come at once."""
CHAT = "/v1/chat/completions"
KINDS = {"gauge": Gauge, "counter": Counter, "histogram": Histogram}


@dataclass(frozen=True)
class Behaviour:
    """How a version behaves.

    Attributes:
        version: named in every piece of an answer.
        error_fraction: of requests that end with status 500.
        wrong_fraction: of wrong sums.
        wrong_template: the answer begins inside the thought, and never ends, as behind a wrong chat template.
        tokens: pieces of a streamed answer.
        token_s: time before each of them.
    """

    version: str = "1"
    error_fraction: float = 0.0
    wrong_fraction: float = 0.0
    wrong_template: bool = False
    tokens: int = 8
    token_s: float = 0.0


class Standin(ThreadingHTTPServer):
    """Answers questions such as `3+4=`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], model: str, behaviour: Behaviour) -> None:
        super().__init__(address, _Handler)
        self.model, self.behaviour, self.random = model, behaviour, random.Random(behaviour.version)
        self.registry = CollectorRegistry()
        self.open, self.lock = 0, threading.Lock()
        self.stopping = False
        self.http = self._metric(VLLM_HTTP)
        labels = {"model_name": model, "engine": "0"}
        self.first, self.inter = (self._metric(each).labels(**labels) for each in (VLLM_FIRST_TOKEN, VLLM_INTER_TOKEN))
        self.running = self._metric(VLLM_RUNNING).labels(**labels)
        self._metric(VLLM_WAITING).labels(**labels)
        for status in ("2xx", "5xx"):  # a counter that is absent before its first error has no rate
            self.http.labels(handler=CHAT, method="POST", status=status)

    def _metric(self, metric: Metric) -> Any:
        return KINDS[metric.kind](metric.name, metric.help, metric.labels, registry=self.registry)

    def drain(self) -> None:
        """Accept nothing new, and return when the open requests have ended."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        while self.open:
            time.sleep(0.02)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Standin

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Health and metrics."""
        if self.path == "/metrics":
            return self._send(200, generate_latest(self.server.registry), CONTENT_TYPE_LATEST)
        return self._send(200 if self.path == "/health" else 404, b"")

    def do_POST(self) -> None:
        """A chat."""
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        with self.server.lock:
            self.server.open += 1
            self.server.running.inc()
            fails = self.server.random.random() < self.server.behaviour.error_fraction
        try:
            self._count("5xx" if fails else "2xx")
            if fails:
                self._send(500, json.dumps({"error": {"message": "broken", "code": 500}}).encode())
            else:
                self._answer(body)
        finally:
            with self.server.lock:
                self.server.open -= 1
                self.server.running.dec()

    def _answer(self, body: dict[str, Any]) -> None:
        how = self.server.behaviour
        reasoning, content = reply(body["messages"], how)
        reason = "length" if how.wrong_template else "stop"
        time.sleep(BEGIN_S)
        if body.get("stream"):
            return self._stream(content)
        self.server.first.observe(how.token_s)
        message = {"role": "assistant", "content": content, "reasoning": reasoning}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        made = {"id": how.version, "object": "chat.completion", "created": 0, "model": self.server.model}
        return self._send(200, json.dumps({**made, "choices": [choice]}).encode())

    def _stream(self, content: str) -> None:
        how = self.server.behaviour
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self._end_headers()
        for number in range(how.tokens):
            time.sleep(how.token_s)
            (self.server.inter if number else self.server.first).observe(how.token_s)
            delta = {"content": content if number == 0 else "."}
            self._chunk({"id": how.version, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        self._event(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, value: dict[str, Any]) -> None:
        self._event(f"data: {json.dumps(value)}\n\n".encode())

    def _event(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _send(self, status: int, data: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self._end_headers()
        self.wfile.write(data)

    def _end_headers(self) -> None:
        if self.server.stopping:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()

    def _count(self, status: str) -> None:
        self.server.http.labels(handler=CHAT, method="POST", status=status).inc()


def behaviour_of(folder: Path) -> Behaviour:
    """How the model in a folder behaves.

    The bundle of a run is a good version, named by the folder, which is its digest. A default temperature above 1
    stands for a fault that only a server shows: so a recipe can make a version whose evaluation and gate find nothing.
    """
    if (told := folder / "behaviour.json").exists():
        return Behaviour(**json.loads(told.read_text(encoding="utf-8")))
    defaults = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    return Behaviour(folder.name[:12], wrong_template=defaults.get("temperature", 0.0) > 1, token_s=0.25)


def sums(number: int) -> list[dict[str, str]]:
    """Rows of test problems that a stand-in answers."""
    pairs = [(first, second) for first in range(number) for second in range(10)][:number]
    return [{"id": f"{a}+{b}", "question": f"{a}+{b}=", "prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def reply(messages: list[dict[str, str]], how: Behaviour) -> tuple[str | None, str]:
    """Thinking and answer: a sum, which a fraction of the questions gets wrong, by version and question."""
    question = messages[-1]["content"]
    terms = question.removesuffix("=").split("+")
    total = sum(int(term) for term in terms if term.strip().isdigit())
    wrong = random.Random(f"{how.version} {question}").random() < how.wrong_fraction
    answer = str(total + wrong)
    if how.wrong_template:
        return None, f"<think>{question} and again {question}"
    thinks = not messages[0]["content"].startswith("detailed thinking off")
    return (f"I add {' and '.join(terms)}." if thinks else None), answer


def main() -> None:
    """Serve until SIGTERM, then finish what is open."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--served-model-name", default="model")
    parser.add_argument("--port", type=int, default=8000)
    options, _ = parser.parse_known_args()
    server = Standin(("", options.port), options.served_model_name, behaviour_of(options.model))

    def end() -> None:
        server.drain()
        os._exit(0)

    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=end).start())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()


if __name__ == "__main__":
    main()
