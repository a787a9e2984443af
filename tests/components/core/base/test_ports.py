"""Requests to this machine, and a proxy that the environment names."""

import http.server
import os
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests  # type: ignore[import-untyped]

from components.core.base import ports
from components.core.base.errors import StoreError
from components.core.base.ports import FIRST_PORT, is_free, never_proxy_loopback, usable_port
from components.core.store.store import open_object_store
from tests.waiting import PATIENCE_S


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers every request."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """A server on loopback."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names a proxy at which nobody answers, and no exception from it."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_library_asks_a_proxy_for_loopback(url: str, host: str) -> None:
    url = url.replace("127.0.0.1", host)
    with pytest.raises(OSError, match="refused"):
        urllib.request.build_opener().open(url)  # `urlopen` reads the environment at its first call only
    never_proxy_loopback()
    with urllib.request.build_opener().open(url) as answer:
        assert answer.read() == b"ok"
    assert httpx.get(url, timeout=PATIENCE_S).text == "ok"
    assert requests.get(url, timeout=PATIENCE_S).text == "ok"


def test_a_store_on_loopback_is_reached(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("TESSERA_S3_ENDPOINT", url)
    with pytest.raises(StoreError, match=r"what answers at 127\.0\.0\.1:\d+ is no S3 server"):
        open_object_store("s3://bucket/prefix").get("file")


@pytest.mark.parametrize("wanted", [None, 0])
def test_a_port_that_is_chosen_is_free_and_none_that_a_connection_to_elsewhere_may_get(
    wanted: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text(f"{FIRST_PORT + 50}\t60999\n")
    monkeypatch.setattr(ports, "OUTGOING_PORTS", tmp_path / "range")
    port = usable_port(wanted)
    assert FIRST_PORT <= port < FIRST_PORT + 50
    assert is_free(port)


@pytest.mark.parametrize("text", [None, f"{FIRST_PORT} 60999"])
def test_a_port_is_chosen_also_where_connections_may_get_any(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "OUTGOING_PORTS", tmp_path / "range")
    if text is not None:
        (tmp_path / "range").write_text(text)
    assert is_free(usable_port(None))


def test_exceptions_that_the_environment_has_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "intern.example,localhost")
    never_proxy_loopback()
    never_proxy_loopback()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intern.example,localhost,127.0.0.1,::1"
    monkeypatch.setenv("no_proxy", "*")
    never_proxy_loopback()
    assert os.environ["no_proxy"] == "*"
