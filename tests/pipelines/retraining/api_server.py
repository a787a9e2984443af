"""A real API server of Kubernetes with its etcd, on free ports of the loopback interface; no node, no controllers."""

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3

from components.core.base.ports import usable_port
from infra.testcluster.build import module_set
from infra.testcluster.layout import Layout
from infra.testcluster.pki import make_certificates
from tests.waiting import wait_until

OPERATOR_TOKEN = "operator-token"
OPERATOR_USER = "system:serviceaccount:models:tessera-operator"
"""Who has that token: the account that the chart makes."""


def binary(modules: str, name: str) -> Path:
    """A program of the test cluster; the test is skipped where it was not built."""
    path = module_set(modules).folder(Layout.from_environment()) / name
    if not path.is_file():
        pytest.skip(f"{name} is not built: `make cluster-up` builds it")
    return path


@contextlib.contextmanager
def running_api_server() -> Iterator[tuple[Path, Path]]:
    """Start both; yields the kubeconfigs of an administrator and of the operator's account."""
    etcd, api_server = binary("etcd", "etcd"), binary("kube", "kube-apiserver")
    folder = Path(tempfile.mkdtemp(prefix="tessera-api-"))
    layout = Layout(folder)
    make_certificates(layout)
    keys = layout.certificates
    (keys / "tokens.csv").write_text(f"{OPERATOR_TOKEN},{OPERATOR_USER},operator\n")
    client, peer, port = (usable_port(None) for _ in range(3))
    url, etcd_url, peer_url = f"https://127.0.0.1:{port}", f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    etcd_options = {
        "data-dir": folder / "etcd",
        "listen-client-urls": etcd_url,
        "advertise-client-urls": etcd_url,
        "listen-peer-urls": peer_url,
        "initial-advertise-peer-urls": peer_url,
        "initial-cluster": f"default={peer_url}",
        "unsafe-no-fsync": "true",
    }
    options = {
        "etcd-servers": etcd_url,
        "bind-address": "127.0.0.1",
        "secure-port": port,
        "endpoint-reconciler-type": "none",
        "service-cluster-ip-range": "10.96.0.0/16",
        "authorization-mode": "RBAC",
        "client-ca-file": keys / "ca.crt",
        "token-auth-file": keys / "tokens.csv",
        "tls-cert-file": keys / "apiserver.crt",
        "tls-private-key-file": keys / "apiserver.key",
        "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
        "service-account-key-file": keys / "tokens.pub",
        "service-account-signing-key-file": keys / "tokens.key",
    }
    admin = {"client-certificate": str(keys / "admin.crt"), "client-key": str(keys / "admin.key")}
    configs = [folder / "admin.json", folder / "operator.json"]
    for path, user in zip(configs, (admin, {"token": OPERATOR_TOKEN}), strict=True):
        path.write_text(json.dumps(_kubeconfig(url, keys / "ca.crt", user)))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for program, settings in ((etcd, etcd_options), (api_server, options)):
            command = [str(program), *(f"--{name}={value}" for name, value in settings.items())]
            log = stack.enter_context((folder / f"{program.name}.log").open("wb"))
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.kill)
        _wait_until_ready(url, keys, folder / "kube-apiserver.log")
        yield configs[0], configs[1]


def _kubeconfig(url: str, authority: Path, user: dict[str, str]) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url, "certificate-authority": str(authority)}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }


def _wait_until_ready(url: str, keys: Path, log: Path) -> None:
    """Wait until the server takes requests."""
    pool = urllib3.PoolManager(
        ca_certs=str(keys / "ca.crt"),
        cert_file=str(keys / "admin.crt"),
        key_file=str(keys / "admin.key"),
        retries=False,
        timeout=10,
    )

    def is_ready() -> bool:
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            return pool.request("GET", f"{url}/readyz").status == 200
        return False

    wait_until("the API server is ready", is_ready, interval_s=0.2, details=lambda: log.read_text()[-2000:])
