"""One certificate authority for the test cluster, what it signs, and the kubeconfigs that use it.

Everything is made once and then left alone: a state folder outlives many starts.
"""

import datetime
import ipaddress
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import BaseModel, ConfigDict

from infra.testcluster.layout import API_SERVICE, API_URL, DNS_DOMAIN, GATEWAY, NODE, Layout

VALID = datetime.timedelta(days=3650)


class Identity(BaseModel):
    """A certificate: whom it names, and on which names and addresses it may serve."""

    model_config = ConfigDict(frozen=True)

    name: str
    user: str
    group: str = ""
    serves: tuple[str, ...] = ()
    kubeconfig: bool = False
    """Whether a kubeconfig with this identity is written."""


IDENTITIES = (
    Identity(
        name="apiserver",
        user="kube-apiserver",
        serves=(
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            f"kubernetes.default.svc.{DNS_DOMAIN}",
            "localhost",
            "127.0.0.1",
            GATEWAY,
            API_SERVICE,
        ),
    ),
    Identity(name="admin", user="admin", group="system:masters", kubeconfig=True),
    Identity(name="controller-manager", user="system:kube-controller-manager", kubeconfig=True),
    Identity(name="scheduler", user="system:kube-scheduler", kubeconfig=True),
    Identity(name="proxy", user="system:kube-proxy", kubeconfig=True),
    Identity(
        name="node",
        user=f"system:node:{NODE}",
        group="system:nodes",
        serves=(NODE, GATEWAY, "127.0.0.1"),
        kubeconfig=True,
    ),
    Identity(name="kubelet-client", user="apiserver-kubelet-client", group="system:masters"),
    Identity(name="front-proxy", user="front-proxy-client"),
    Identity(name="webhook", user="webhooks", serves=("localhost", "127.0.0.1")),
)


def make_certificates(layout: Layout) -> None:
    """Write what is missing: the authority, every identity, the key of service account tokens, kubeconfigs."""
    folder = layout.certificates
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (folder / "ca.crt").exists():
        _make_authority(folder)
    for identity in IDENTITIES:
        if not (folder / f"{identity.name}.crt").exists():
            _sign(folder, identity)
        if identity.kubeconfig:
            path = layout.state / f"{identity.name}.kubeconfig"
            path.write_text(yaml.safe_dump(_kubeconfig(folder, identity.name)))
            path.chmod(0o600)
    if not (folder / "tokens.pub").exists():
        key = _new_key(folder / "tokens.key")
        (folder / "tokens.pub").write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )


def _make_authority(folder: Path) -> None:
    key, name = _new_key(folder / "ca.key"), _name("tessera-testcluster")
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    builder = _builder(name, name, key, key).add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    )
    certificate = builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _sign(folder: Path, identity: Identity) -> None:
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    authority_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    assert isinstance(authority_key, rsa.RSAPrivateKey)
    key = _new_key(folder / f"{identity.name}.key")
    builder = _builder(_name(identity.user, identity.group), authority.subject, key, authority_key)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if identity.serves:
        names = x509.SubjectAlternativeName([_general_name(text) for text in identity.serves])
        builder = builder.add_extension(names, critical=False)
    certificate = builder.sign(authority_key, hashes.SHA256())
    (folder / f"{identity.name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPrivateKey, issuer_key: rsa.RSAPrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _name(user: str, group: str = "") -> x509.Name:
    """A subject as Kubernetes reads it: the common name is the user, the organization the group."""
    groups = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []
    return x509.Name([*groups, x509.NameAttribute(NameOID.COMMON_NAME, user)])


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _new_key(path: Path) -> rsa.RSAPrivateKey:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    return key


def _kubeconfig(folder: Path, name: str) -> dict[str, object]:
    cluster = {"server": API_URL, "certificate-authority": str(folder / "ca.crt")}
    user = {"client-certificate": str(folder / f"{name}.crt"), "client-key": str(folder / f"{name}.key")}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "testcluster", "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "testcluster", "context": {"cluster": "testcluster", "user": name}}],
        "current-context": "testcluster",
    }
