"""What can be wrong with an S3 store: each as one error with a way out, and nothing half-written."""

import http.server
import io
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import CorruptArtifact, StoreError
from components.core.store import bucket_store
from components.core.store.artifact_store import blob_path
from components.core.store.store import Store, open_store
from tests.faulty_proxy import Fault, faulty_proxy
from tests.s3_server import BUCKET, S3Server

PART_BYTES = 5 << 20
"""The smallest that S3 takes."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "rows.jsonl").write_text("{}\n")
    return tmp_path / "source"


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PATIENCE_S": 0.1, "QUIET_S": 0.05, "PAUSE_S": 0.001}.items():
        monkeypatch.setattr(bucket_store, name, value)


USES: dict[str, Callable[[Store, Path], Any]] = {
    "put_folder": lambda store, source: store.put_folder(source, "data"),
    "fetch": lambda store, _: store.fetch("0" * 64),
    "claim": lambda store, _: store.claim("runs/a/run.json", {}),
    "documents": lambda store, _: store.documents("runs/"),
}


@pytest.fixture(params=USES)
def use(request: pytest.FixtureRequest) -> Callable[[Store, Path], Any]:
    return USES[request.param]


def refusal(uri: str, tmp_path: Path, use: Callable[[Store, Path], Any]) -> str:
    """The message of a use that must fail, and leave nothing on this machine."""
    local = tmp_path / "local"
    with pytest.raises(StoreError) as caught:
        use(open_store(uri, local=local), tmp_path / "source")
    assert not local.exists()
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "secret", "code"), [("test", "wrong", "SignatureDoesNotMatch"), ("nobody", "wrong", "InvalidAccessKeyId")]
)
def test_wrong_credentials(
    s3_uri: str,
    s3_server: Any,
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[[Store, Path], Any],
    key: str,
    secret: str,
    code: str,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    message = refusal(s3_uri, tmp_path, use)
    assert message.startswith(f"the S3 server refuses these credentials for bucket 'tessera' ({code})")
    assert "hint: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message
    assert secret not in message.partition("hint")[0]
    assert not list(s3_server.client().list_objects("tessera", s3_uri.rpartition("/")[2], recursive=True))


def test_missing_bucket(s3_uri: str, tmp_path: Path, source: Path, use: Callable[[Store, Path], Any]) -> None:
    message = refusal("s3://nowhere/prefix", tmp_path, use)
    assert message.startswith("there is no bucket 'nowhere' at 127.0.0.1:")
    assert "hint: create it with `tessera store init s3://nowhere/prefix`, or check --store" in message


def test_unreachable_endpoint(
    s3_uri: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Store, Path], Any]
) -> None:
    monkeypatch.setenv("TESSERA_S3_ENDPOINT", "http://127.0.0.1:1")
    message = refusal(s3_uri, tmp_path, use)
    assert message.startswith("the S3 server at 127.0.0.1:1 cannot be reached:")
    assert "hint: check TESSERA_S3_ENDPOINT" in message


def test_an_endpoint_that_is_no_s3_server(
    s3_uri: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(418)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TESSERA_S3_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        message = refusal(s3_uri, tmp_path, USES["claim"])
        server.shutdown()
    assert message.startswith(f"what answers at 127.0.0.1:{server.server_port} is no S3 server")


def test_no_endpoint_and_no_credentials(
    s3_uri: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MINIO_SECRET_KEY", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "needs credentials" in refusal(s3_uri, tmp_path, USES["claim"])
    monkeypatch.delenv("TESSERA_S3_ENDPOINT")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MINIO_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert "set TESSERA_S3_ENDPOINT or AWS_ENDPOINT_URL_S3" in refusal(s3_uri, tmp_path, USES["claim"])


def test_a_machine_without_certificates_is_one_error(
    s3_uri: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    message = refusal(s3_uri, tmp_path, USES["claim"])
    assert "has no certificates of authorities" in message
    assert "install ca-certificates" in message


def test_credentials_come_from_a_mounted_file(
    s3_uri: str, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    file.write_text(f"[default]\naws_access_key_id = {s3_server.key}\naws_secret_access_key = {s3_server.secret}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    assert open_store(s3_uri, local=tmp_path / "local").claim("runs/a/run.json", {})


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://", "s3:// names no bucket"),
        ("s3:///prefix", "s3:///prefix names no bucket"),
        ("ftp://bucket/prefix", "ftp://bucket/prefix is no store"),
        ("s3://UPPER CASE/prefix", "UPPER CASE"),
    ],
)
def test_addresses_that_are_no_store(s3_uri: str, tmp_path: Path, source: Path, uri: str, words: str) -> None:
    assert words in refusal(uri, tmp_path, USES["claim"])


@pytest.mark.parametrize("prefix", ["exp#1", "what?x=1", "a%20b", "100%", "a b/+~;/ü", "...", "ends/"])
def test_a_prefix_is_used_exactly_as_written(s3_uri: str, s3_server: S3Server, tmp_path: Path, prefix: str) -> None:
    uri = f"{s3_uri}/{prefix}"
    assert open_store(uri, local=tmp_path).claim("runs/a/run.json", {})
    root = s3_uri.rpartition("/")[2]
    names = [found.object_name for found in s3_server.client().list_objects(BUCKET, f"{root}/", recursive=True)]
    assert names == [f"{root}/{prefix.strip('/')}/runs/a/run.json"]
    assert open_store(uri, local=tmp_path).documents("runs/") == ["runs/a/run.json"]


@pytest.mark.parametrize(
    "prefix", ["a/./x", "a/../x", "double//slash", "/x", "x//", "back\\slash", "new\nline", ".", ".."]
)
def test_a_prefix_that_would_be_stored_otherwise_is_refused(s3_uri: str, prefix: str) -> None:
    with pytest.raises(StoreError, match="is no address of a store: its prefix has"):
        open_store(f"s3://{BUCKET}/{prefix}")


@pytest.mark.parametrize("value", ["http://127.0.0.1:1/path", "http://127.0.0.1:1?x=1", "ftp://127.0.0.1", "http://"])
def test_an_endpoint_with_more_than_a_server_is_refused(
    s3_uri: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TESSERA_S3_ENDPOINT", value)
    assert f"TESSERA_S3_ENDPOINT is not the address of an S3 server: {value}" in refusal(
        s3_uri, tmp_path, USES["claim"]
    )


@pytest.mark.parametrize("size", [PART_BYTES, 2 * PART_BYTES, 2 * PART_BYTES + 1, 4 * PART_BYTES - 7])
def test_a_large_object_travels_in_parts_and_one_that_was_cut_is_noticed(
    s3_uri: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(bucket_store, "PART_BYTES", PART_BYTES)
    contents = random.Random(size).randbytes(size)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights").write_bytes(contents)
    store = open_store(s3_uri, local=tmp_path / "here")
    made = store.put_folder(tmp_path / "source", "model")
    assert (store.fetch(made.digest) / "weights").read_bytes() == contents
    path = f"{s3_uri.rpartition('/')[2]}/{blob_path(made.files['weights'].sha256)}"
    for cut in (contents[:-1], contents[: size // 3]):
        s3_server.client().put_object(BUCKET, path, io.BytesIO(cut), len(cut))
        with pytest.raises(CorruptArtifact, match="was changed"):
            open_store(s3_uri, local=tmp_path / "elsewhere").fetch(made.digest)
        assert not (tmp_path / "elsewhere" / "artifacts" / made.digest).exists()


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        StoreError, match="file is a file\n  hint: a store is a folder or s3://bucket/prefix, or the same"
    ):
        open_store(tmp_path / "file")


def test_no_space_on_the_server(
    s3_uri: str, s3_server: S3Server, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("TESSERA_S3_ENDPOINT", proxy.endpoint)
        proxy.faults = [Fault("answer", "PUT", "blobs/", times=99, status=403, code="QuotaExceeded")]
        store = open_store(s3_uri, local=tmp_path / "local")
        with pytest.raises(StoreError, match=r"no space left in bucket 'tessera': 3 bytes are needed"):
            store.put_folder(source, "data")
        assert store.documents("artifacts/") == []


def test_a_workload_identity_is_left_to_the_library(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server
) -> None:
    """The keys come from an address that only a pod knows, as in a cluster of Amazon's."""

    class Identity(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys = {"AccessKeyId": s3_server.key, "SecretAccessKey": s3_server.secret, "Token": ""}
            body = json.dumps({**keys, "Expiration": "2099-01-01T00:00:00Z"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("token")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Identity) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.server_port}/keys")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
        assert open_store(s3_uri, local=tmp_path / "local").claim("runs/a/run.json", {})
        server.shutdown()


@pytest.mark.parametrize("uri", ["gs://bucket/prefix", "az://account/container/prefix"])
def test_other_clouds_are_reached_through_the_library(
    uri: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"gcs_base_url": "http://127.0.0.1:1", "disable_oauth": True, "client_email": "", "private_key": ""}
    (tmp_path / "key.json").write_text(json.dumps({**key, "private_key_id": ""}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "key.json"))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
    assert f"the object store at {uri} cannot be reached" in refusal(uri, tmp_path, USES["claim"])
