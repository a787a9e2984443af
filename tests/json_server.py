"""An HTTP server that answers in JSON, for the stand-ins of other programs' interfaces."""

import contextlib
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Request:
    """One request."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    content_type: str
    authorization: str = ""


@contextlib.contextmanager
def running_server(handler: type[BaseHTTPRequestHandler], host: str = LOOPBACK) -> Iterator[str]:
    """A server on a free port, with a thread for each request; yields its URL."""
    server = ThreadingHTTPServer((host, 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def running_json_server(answer: Callable[[Request], tuple[int, Any]], host: str = LOOPBACK) -> Iterator[str]:
    """A server on a free port; yields its URL.

    Args:
        answer: gives the status and the value of each request; threads call it at the same time.
        host: address of the interface.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = dict(urllib.parse.parse_qsl(url.query))
            token = self.headers.get("Authorization") or self.headers.get("PRIVATE-TOKEN") or ""
            request = Request(self.command, url.path, query, body, self.headers.get("Content-Type", ""), token)
            status, value = answer(request)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with running_server(Handler, host) as url:
        yield url


def write_kubeconfig(folder: Path, url: str) -> Path:
    """Write the kubeconfig of a server that stands in for a Kubernetes API server."""
    named = {
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **named}))
    return path
