import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from infra.testcluster.layout import Layout
from infra.testcluster.pki import IDENTITIES, make_certificates


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = Layout(tmp_path_factory.mktemp("cluster"))
    make_certificates(layout)
    return layout


def openssl(*arguments: str) -> str:
    return subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True).stdout


def test_openssl_accepts_every_certificate_for_servers_and_clients(layout: Layout) -> None:
    for identity in IDENTITIES:
        path = str(layout.certificates / f"{identity.name}.crt")
        for purpose in ("sslserver", "sslclient"):
            authority = str(layout.certificates / "ca.crt")
            assert "OK" in openssl("verify", "-x509_strict", "-purpose", purpose, "-CAfile", authority, path)


def test_a_subject_names_user_and_group_as_kubernetes_reads_them(layout: Layout) -> None:
    text = openssl("x509", "-noout", "-subject", "-in", str(layout.certificates / "node.crt"))
    assert "O = system:nodes" in text
    assert "CN = system:node:node1" in text


def test_the_api_server_serves_its_service_address_and_names(layout: Layout) -> None:
    text = openssl("x509", "-noout", "-ext", "subjectAltName", "-in", str(layout.certificates / "apiserver.crt"))
    assert "IP Address:10.96.0.1" in text
    assert "DNS:kubernetes.default.svc" in text


def test_keys_and_kubeconfigs_are_for_their_owner_alone(layout: Layout) -> None:
    for path in (*layout.certificates.glob("*.key"), *layout.state.glob("*.kubeconfig")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_kubeconfig_names_files_that_exist(layout: Layout) -> None:
    config = yaml.safe_load(layout.kubeconfig.read_text())
    user, cluster = config["users"][0]["user"], config["clusters"][0]["cluster"]
    for path in (user["client-certificate"], user["client-key"], cluster["certificate-authority"]):
        assert Path(path).is_file()


def test_a_second_call_leaves_every_key_alone(layout: Layout) -> None:
    before = {path: path.read_bytes() for path in layout.certificates.iterdir()}
    make_certificates(layout)
    assert {path: path.read_bytes() for path in layout.certificates.iterdir()} == before
