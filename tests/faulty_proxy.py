"""A proxy in front of a server that spoils chosen requests."""

import contextlib
import http.client
import http.server
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["answer", "reset", "lose answer", "cut", "delay", "late", "trickle", "hang", "flip"]


@dataclass
class Fault:
    """What happens to requests.

    Attributes:
        kind: answer in the server's place; reset the connection before the server hears of it; pass it on and reset
            in place of the answer; cut the answer's body off; delay it; pass the request on late; send the answer bit
            by bit; never answer; change one bit of what is sent.
        method: of the requests; any where empty.
        path: what their address has to contain.
        times: how many of them; the others pass.
        skip: how many pass before.
        status: of an answer.
        code: of an answer, as S3 has it; without one the body is a web page.
        after: bytes of the body that are let through, or seconds that it is delayed.
    """

    kind: Kind
    method: str = ""
    path: str = ""
    times: int = 1
    skip: int = 0
    status: int = 503
    code: str = ""
    after: float = 0


@dataclass
class FaultyProxy:
    """A proxy in front of a server; `faults` can be changed at any time."""

    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    """Method and address of every request."""
    ranges: list[str] = field(default_factory=list)
    """The stretch that each request asks for; empty for all of an object."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets."""
        with self.lock:
            self.seen.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times > 0 and method.startswith(fault.method) and fault.path in path:
                    fault.skip -= 1
                    if fault.skip < 0:
                        fault.times -= 1
                        return fault
        return None


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A proxy in front of the server at `upstream`, `http://host:port`."""
    address = upstream.removeprefix("http://")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()

        def any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.ranges.append(self.headers.get("Range") or "")
            fault = proxy.take(self.command, self.path)
            match fault:
                case Fault(kind="answer"):
                    self.refuse(fault.status, fault.code)
                case Fault(kind="reset"):
                    self.reset()
                case Fault(kind="late"):
                    time.sleep(fault.after)
                    self.pass_on(body, None)
                case Fault(kind="flip"):
                    self.pass_on(bytes([body[0] ^ 1]) + body[1:], None)
                case Fault(kind="hang"):
                    proxy.closing.wait()
                    self.reset()
                case _:
                    self.pass_on(body, fault)

        do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = any

        def pass_on(self, body: bytes, fault: Fault | None) -> None:
            server = http.client.HTTPConnection(address, timeout=60)
            try:
                server.request(self.command, self.path, body, dict(self.headers))  # the signature covers its headers
                answer = server.getresponse()
                data = answer.read()
            except OSError:  # the server is away
                self.reset()
                return
            finally:
                server.close()
            if fault and fault.kind == "lose answer":
                self.reset()
                return
            if fault and fault.kind == "delay":
                time.sleep(fault.after)
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if fault and fault.kind == "cut":
                self.wfile.write(data[: int(fault.after)])
                self.close_connection = True
            elif fault and fault.kind == "trickle":
                for start in range(0, len(data), -(-len(data) // 20)):
                    self.wfile.write(data[start : start + -(-len(data) // 20)])
                    time.sleep(fault.after)
            elif self.command != "HEAD":
                self.wfile.write(data)

        def refuse(self, status: int, code: str) -> None:
            text = f"<Error><Code>{code}</Code><Message>told so</Message></Error>" if code else "<html>busy</html>"
            data = b"" if self.command == "HEAD" else text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml" if code else "text/html")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def reset(self) -> None:
            """Close so that the other side gets RST rather than an end."""
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        proxy = FaultyProxy(f"http://127.0.0.1:{server.server_port}")
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            server.shutdown()
