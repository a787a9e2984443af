"""A store is created and checked by one command, against a real S3 server."""

import uuid
from pathlib import Path

import pytest
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from typer.testing import CliRunner

from components.core.base.errors import StoreError
from components.core.store.folder_store import FolderStore
from components.core.store.store import open_store
from components.core.store.store_setup import SetupStep, init_store
from pipelines.commands.artifacts import store_app
from tests.faulty_proxy import Fault, faulty_proxy
from tests.s3_server import BUCKET, S3Server

CHECKS = ["write", "read", "conditional create", "list", "delete"]


@pytest.fixture
def new_bucket(s3_uri: str) -> str:
    """Name of a bucket that does not exist."""
    return f"bucket-{uuid.uuid4().hex}"


def objects(server: S3Server, bucket: str) -> list[str]:
    return [found.object_name for found in server.client().list_objects(bucket, recursive=True)]


def test_init_creates_the_bucket_that_the_error_of_a_missing_one_names(
    new_bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    uri = f"s3://{new_bucket}/prefix"
    store = open_store(uri, local=tmp_path)
    with pytest.raises(StoreError, match=f"no bucket '{new_bucket}' at 127.0.0.1") as caught:
        store.claim("runs/a/run.json", {})
    assert caught.value.hint is not None
    assert f"`tessera store init {uri}`" in caught.value.hint

    answer = CliRunner().invoke(store_app, ["init", uri])
    assert answer.exit_code == 0, answer.output
    assert answer.output.splitlines() == [
        f"bucket: {new_bucket} at {s3_server.endpoint.removeprefix('http://')} created",
        "lifecycle rule: abandoned uploads end after 2 days",
        *(f"{check}: allowed" for check in CHECKS),
    ]
    (rule,) = s3_server.client().get_bucket_lifecycle(new_bucket).rules
    assert rule.rule_filter.prefix == "prefix/"
    assert rule.abort_incomplete_multipart_upload.days_after_initiation == 2
    assert objects(s3_server, new_bucket) == []
    assert store.claim("runs/a/run.json", {})

    again = CliRunner().invoke(store_app, ["init", uri])
    assert f"{new_bucket} at" in again.output
    assert "exists" in again.output.splitlines()[0]
    assert objects(s3_server, new_bucket) == ["prefix/runs/a/run.json"]
    assert len(s3_server.client().get_bucket_lifecycle(new_bucket).rules) == 1


def test_init_of_a_folder_checks_access(tmp_path: Path) -> None:
    assert [step.name for step in init_store(str(tmp_path / "store")) if step.passed] == CHECKS
    assert list((tmp_path / "store").iterdir()) == []


def test_credentials_that_may_only_read_fail_the_write_check(
    s3_uri: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = s3_server.reader
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    answer = CliRunner().invoke(store_app, ["init", s3_uri])
    assert answer.exit_code == 2
    assert (
        "\nlifecycle rule: abandoned uploads stay in bucket 'tessera': its lifecycle rule cannot be set"
        in answer.output
    )
    assert "\nwrite: failed: these credentials may not write to bucket 'tessera' (AccessDenied)" in answer.output


@pytest.mark.parametrize(
    ("method", "check"), [("GET", "read"), ("DELETE", "delete"), ("PUT", "write")], ids=["read", "delete", "write"]
)
def test_a_refused_kind_of_access_fails_its_check(
    s3_uri: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, method: str, check: str
) -> None:
    with faulty_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("TESSERA_S3_ENDPOINT", proxy.endpoint)
        proxy.faults = [Fault("answer", method, "probe-", times=1, status=403, code="AccessDenied")]
        failed = {step.name: step.result for step in init_store(s3_uri) if not step.passed}
    assert list(failed) == [check]
    assert "AccessDenied" in failed[check]
    prefix = s3_uri.rpartition("/")[2]
    assert not [path for path in objects(s3_server, BUCKET) if path.startswith(prefix)]


def test_a_server_that_ignores_the_condition_of_a_write_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = FolderStore.put
    monkeypatch.setattr(FolderStore, "put", lambda self, path, data, if_absent=False: put(self, path, data))
    failed = [step for step in init_store(str(tmp_path / "store")) if not step.passed]
    assert failed == [
        SetupStep(
            "conditional create",
            "failed: an existing object is overwritten, so two writers of one record would both win",
            passed=False,
        )
    ]


def test_rules_of_others_are_never_written_again(new_bucket: str, s3_server: S3Server) -> None:
    """MinIO's client does not know every kind of rule, so that writing one back may change it."""
    client = s3_server.client()
    client.make_bucket(new_bucket)
    theirs = Rule(ENABLED, rule_id="theirs", rule_filter=Filter(prefix="logs/"), expiration=Expiration(days=9))
    client.set_bucket_lifecycle(new_bucket, LifecycleConfig([theirs]))
    results = {step.name: step for step in init_store(f"s3://{new_bucket}/prefix")}
    assert "(it has rules of its own)" in results["lifecycle rule"].result
    assert all(step.passed for step in results.values())
    assert [rule.rule_id for rule in client.get_bucket_lifecycle(new_bucket).rules] == ["theirs"]


def test_a_server_that_refuses_to_create_the_bucket_is_one_error(
    new_bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("TESSERA_S3_ENDPOINT", proxy.endpoint)
        proxy.faults = [Fault("answer", "PUT", new_bucket, times=9, status=403, code="AccessDenied")]
        with pytest.raises(StoreError, match=rf"bucket '{new_bucket}' cannot be created at .* \(AccessDenied\)"):
            list(init_store(f"s3://{new_bucket}/prefix"))
