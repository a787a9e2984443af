"""Signatures of artifacts, by public keys.

    signatures/<digest>/<key id>.json         the signed line, and the signature in base64

What is signed is one line that names the artifact's digest, which covers every file. Keys are PEM: ECDSA on P-256 with
SHA-256, as cosign and openssl use it, or Ed25519. `cosign verify-blob --key PUBLIC --signature SIGNATURE LINE` checks
the same.
"""

import base64
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256

from components.core.base.errors import InputError, UntrustedArtifact
from components.core.store.store import Store

PASSWORD = "TESSERA_SIGNING_PASSWORD"
"""Environment variable with the password of an encrypted private key."""
MAX_KEY_BYTES = 64 << 10

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


def sign_artifact(store: Store, digest: str, key_file: Path) -> str:
    """Sign an artifact after verifying every byte of it; returns the id of the key.

    Args:
        store: the store of the artifact and of the signature.
        digest: of the artifact.
        key_file: a private key, PEM.

    Raises:
        InputError: the key cannot be read.
        CorruptArtifact: the artifact was changed.
    """
    key = _private_key(key_file)
    store.verify(digest)
    line = statement(digest).encode()
    signature = key.sign(line) if isinstance(key, ed25519.Ed25519PrivateKey) else key.sign(line, ec.ECDSA(SHA256()))
    name = key_id(key.public_key())
    signed = {"statement": line.decode(), "signature": base64.b64encode(signature).decode()}
    store.put_document(_path(digest, name), signed)
    return name


class SignedLine(NamedTuple):
    """A signature as the store has it.

    Attributes:
        key: id of the key.
        statement: the signed line.
        signature: in base64.
    """

    key: str
    statement: str
    signature: str


def sign_once(store: Store, digest: str, key_file: Path) -> SignedLine:
    """Sign an artifact unless the key has signed it already; returns the signature.

    Raises:
        InputError: the key cannot be read.
        CorruptArtifact: the artifact was changed.
    """
    key = _private_key(key_file).public_key()
    if not _has_signed(store, digest, key):
        sign_artifact(store, digest, key_file)
    found = store.document(_path(digest, key_id(key)))
    return SignedLine(key_id(key), statement(digest), found["signature"])


def demand_signature(store: Store, digest: str, key_files: Sequence[Path], what: str) -> None:
    """Refuse an artifact that none of the trusted keys has signed.

    Args:
        store: the store of the artifact and its signatures.
        digest: of the artifact.
        key_files: public keys, PEM.
        what: the artifact's part, for the message.

    Raises:
        UntrustedArtifact: none of the keys has signed it.
        InputError: a key cannot be read.
    """
    keys = [_public_key(path) for path in key_files]
    if not any(_has_signed(store, digest, key) for key in keys):
        trusted = ", ".join(map(key_id, keys))
        raise UntrustedArtifact(
            f"the {what} {digest} is not signed by any of the trusted keys: {trusted}",
            hint=f"have it signed: tessera store sign {digest} --key PRIVATE_KEY --store {store.uri}",
        )


def statement(digest: str) -> str:
    """The line that a signature covers."""
    return f"tessera artifact sha256:{digest}\n"


def key_id(key: PublicKey) -> str:
    """Id of a key: the beginning of the SHA-256 of its DER form."""
    form = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return sha256(form).hexdigest()[:32]


def _has_signed(store: Store, digest: str, key: PublicKey) -> bool:
    """Whether the store has a valid signature by a key. The signed line is computed, never read from the store."""
    found = store.read_document_or_none(_path(digest, key_id(key)))
    line = statement(digest).encode()
    try:
        signature = base64.b64decode(found["signature"], validate=True) if found is not None else b""
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, line)
        else:
            key.verify(signature, line, ec.ECDSA(SHA256()))
    except (InvalidSignature, LookupError, TypeError, ValueError):
        return False
    return True


def _public_key(path: Path) -> PublicKey:
    try:
        key = serialization.load_pem_public_key(_pem(path))
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{path} is no public key", hint="PEM, ECDSA on P-256 or Ed25519") from None
    if isinstance(key, ed25519.Ed25519PublicKey) or (isinstance(key, ec.EllipticCurvePublicKey) and _is_p256(key)):
        return key
    raise _of_another_kind(path)


def _private_key(path: Path) -> PrivateKey:
    password = os.environ.get(PASSWORD)
    try:
        key = serialization.load_pem_private_key(_pem(path), password.encode() if password else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError(
            f"{path} is no private key, or its password is another",
            hint=f"PEM, ECDSA on P-256 or Ed25519; the password of an encrypted one in {PASSWORD}",
        ) from None
    if isinstance(key, ed25519.Ed25519PrivateKey) or (isinstance(key, ec.EllipticCurvePrivateKey) and _is_p256(key)):
        return key
    raise _of_another_kind(path)


def _is_p256(key: ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey) -> bool:
    return isinstance(key.curve, ec.SECP256R1)


def _of_another_kind(path: Path) -> InputError:
    return InputError(f"{path} is a key of another kind", hint="ECDSA on P-256 or Ed25519")


def _pem(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_KEY_BYTES)
    except OSError as error:
        raise InputError(f"the key {path} cannot be read: {error.strerror}") from None


def _path(digest: str, name: str) -> str:
    return f"signatures/{digest}/{name}.json"
