"""Signatures: made and checked by openssl alike, and good for one artifact and one key alone."""

import base64
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from components.core.base.errors import CorruptArtifact, InputError, UntrustedArtifact
from components.core.store.garbage_collection import collect_garbage
from components.core.store.signatures import PASSWORD, demand_signature, sign_artifact, statement
from components.core.store.store import Store, open_store
from components.core.store.verification import find_faults

CURVES = {"p256": "EC -pkeyopt ec_paramgen_curve:P-256", "ed25519": "ED25519"}


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def key_pair(folder: Path, name: str = "key", kind: str = "p256", password: str | None = None) -> tuple[Path, Path]:
    """A private and a public key, by openssl."""
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    locked = ["-aes256", "-pass", f"pass:{password}"] if password else []
    openssl("genpkey", "-algorithm", *CURVES[kind].split(), "-out", private, *locked)
    openssl("pkey", "-in", private, "-pubout", "-out", public, *(["-passin", f"pass:{password}"] if password else []))
    return private, public


@pytest.fixture
def store(store_uri: str, tmp_path: Path) -> Store:
    return open_store(store_uri, local=tmp_path / "local")


@pytest.fixture
def put(store: Store, tmp_path: Path) -> Callable[[str], str]:
    def artifact(text: str) -> str:
        folder = tmp_path / "made" / text
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text(text)
        return store.put_folder(folder, "data").digest

    return artifact


@pytest.mark.parametrize("kind", CURVES)
def test_a_signature_is_good_for_one_artifact_and_one_key(
    store: Store, put: Callable[[str], str], tmp_path: Path, kind: str
) -> None:
    mine, other = put("mine"), put("other")
    (private, public), (_, stranger) = key_pair(tmp_path, "a", kind), key_pair(tmp_path, "b", kind)
    with pytest.raises(UntrustedArtifact, match=f"the model {mine} is not signed by any of the trusted keys"):
        demand_signature(store, mine, [public], "model")
    sign_artifact(store, mine, private)
    demand_signature(store, mine, [stranger, public], "model")
    for digest, keys in ((mine, [stranger]), (other, [public]), (mine, [])):
        with pytest.raises(UntrustedArtifact, match="hint: have it signed: tessera store sign"):
            demand_signature(store, digest, keys, "model")


@pytest.mark.parametrize("kind", CURVES)
def test_openssl_checks_it_and_makes_it(tmp_path: Path, kind: str) -> None:
    store, line, raw = open_store(tmp_path / "store"), tmp_path / "line", tmp_path / "raw"
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a").touch()
    digest = store.put_folder(tmp_path / "rows", "data").digest
    private, public = key_pair(tmp_path, kind=kind)
    path = f"signatures/{digest}/{sign_artifact(store, digest, private)}.json"
    signed = store.document(path)
    line.write_text(signed["statement"])
    raw.write_bytes(base64.b64decode(signed["signature"]))
    assert signed["statement"] == statement(digest) == f"tessera artifact sha256:{digest}\n"
    how = ["-rawin"] if kind == "ed25519" else ["-rawin", "-digest", "sha256"]
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", public, *how, "-in", line, "-sigfile", raw)

    openssl("pkeyutl", "-sign", "-inkey", private, *how, "-in", line, "-out", raw)
    store.put_document(path, signed | {"signature": base64.b64encode(raw.read_bytes()).decode()})
    demand_signature(store, digest, [public], "model")


def test_a_signature_that_was_changed_or_moved_is_none(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        digests.append(store.put_folder(tmp_path / name, "data").digest)
    private, public = key_pair(tmp_path)
    name = sign_artifact(store, digests[0], private)
    paths = [f"signatures/{digest}/{name}.json" for digest in digests]
    good = store.document(paths[0])
    store.put_document(paths[1], good)  # sealed for its new place by somebody who can
    with pytest.raises(UntrustedArtifact):
        demand_signature(store, digests[1], [public], "model")
    nothing: dict[str, str] = {}
    for bad in (
        nothing,
        good | {"signature": ""},
        good | {"signature": "no base64!"},
        good | {"signature": 5},
        good | {"signature": base64.b64encode(bytes(64)).decode()},
        good | {"signature": good["signature"][::-1]},
    ):
        store.put_document(paths[0], bad)
        with pytest.raises(UntrustedArtifact):
            demand_signature(store, digests[0], [public], "model")
    shutil.copy(tmp_path / "store" / paths[1], tmp_path / "store" / paths[0])
    assert set(find_faults(store)) == {paths[0]}
    with pytest.raises(UntrustedArtifact):
        demand_signature(store, digests[0], [public], "model")
    store.put_document(paths[0], {**good, "statement": "another"})  # never read
    demand_signature(store, digests[0], [public], "model")


def test_nothing_damaged_is_signed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a").write_text("a")
    digest = store.put_folder(tmp_path / "a", "data").digest
    blob = tmp_path / "store" / store.documents("blobs/")[0]
    blob.chmod(0o644)
    blob.write_text("b")
    with pytest.raises(CorruptArtifact):
        sign_artifact(open_store(tmp_path / "store"), digest, key_pair(tmp_path)[0])
    assert store.documents("signatures/") == []


def test_the_password_of_a_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "store")
    (tmp_path / "a").mkdir()
    digest = store.put_folder(tmp_path / "a", "data").digest
    private, public = key_pair(tmp_path, password="open sesame")
    for password in (None, "wrong"):
        if password:
            monkeypatch.setenv(PASSWORD, password)
        with pytest.raises(InputError, match=r"key.key is no private key") as caught:
            sign_artifact(store, digest, private)
        assert "wrong" not in str(caught.value)
    monkeypatch.setenv(PASSWORD, "open sesame")
    sign_artifact(store, digest, private)
    demand_signature(store, digest, [public], "model")


def test_keys_that_are_none_are_named(tmp_path: Path) -> None:
    store, digest = open_store(tmp_path / "store"), "0" * 64
    private, public = key_pair(tmp_path)
    openssl("genpkey", "-algorithm", "RSA", "-out", tmp_path / "rsa.key")
    openssl("pkey", "-in", tmp_path / "rsa.key", "-pubout", "-out", tmp_path / "rsa.pub")
    (tmp_path / "text").write_text("no key")
    for path, message in (
        (tmp_path / "absent", "cannot be read: No such file"),
        (tmp_path / "text", "text is no public key"),
        (private, "is no public key"),
        (tmp_path / "rsa.pub", "is a key of another kind"),
    ):
        with pytest.raises(InputError, match=message):
            demand_signature(store, digest, [path], "model")
    for path, message in ((public, "is no private key"), (tmp_path / "rsa.key", "is a key of another kind")):
        with pytest.raises(InputError, match=message):
            sign_artifact(store, digest, path)


def test_signatures_go_with_what_they_vouch_for(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a").touch()
    digest = store.put_folder(tmp_path / "a", "data").digest
    sign_artifact(store, digest, key_pair(tmp_path)[0])
    collect_garbage(store)
    assert len(store.documents("signatures/")) == 1
    collect_garbage(store, grace_s=-5)
    assert store.documents("signatures/") == store.documents("artifacts/") == []
