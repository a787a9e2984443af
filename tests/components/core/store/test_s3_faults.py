"""An S3 server that goes away, is slow, spoils answers or refuses: bridged, or one error; never half an artifact."""

import logging
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import StoreError
from components.core.store import bucket_store
from components.core.store.artifact_store import blob_path
from components.core.store.garbage_collection import collect_garbage
from components.core.store.manifest import hash_file
from components.core.store.store import Store, open_store
from components.core.store.verification import find_faults
from tests.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.s3_server import BUCKET, S3Server, fresh_prefix, running_server
from tests.waiting import PATIENCE_S, wait_until

SMALL = b'{"question": "1+1", "answer": "2"}\n' * 100
PART_BYTES = 5 << 20
"""The smallest that S3 takes."""
LARGE = random.Random(1).randbytes(2 * PART_BYTES + 12345)
IMPATIENT = {"PATIENCE_S": 0.5, "QUIET_S": 0.1, "PAUSE_S": 0.01}
"""Limits with which a store gives up within a second."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_store, "PART_BYTES", PART_BYTES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a file that travels in one request, and one that travels in parts."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(SMALL)
    (folder / "weights").write_bytes(LARGE)
    return folder


@pytest.fixture
def proxy(s3_uri: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What stands between the store and the server."""
    with faulty_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("TESSERA_S3_ENDPOINT", proxy.endpoint)
        yield proxy


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that tests may kill."""
    with running_server(lambda: tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up within a second."""
    for name, value in IMPATIENT.items():
        monkeypatch.setattr(bucket_store, name, value)


def opened(uri: str, tmp_path: Path, machine: str = "here") -> Store:
    return open_store(uri, local=tmp_path / "local" / machine)


def assert_whole(uri: str, digest: str, tmp_path: Path) -> None:
    """Another machine gets every byte."""
    copy = opened(uri, tmp_path, f"elsewhere-{random.random()}").fetch(digest)
    assert (copy / "rows.jsonl").read_bytes() == SMALL
    assert (copy / "weights").read_bytes() == LARGE


def assert_nothing_half(uri: str, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No artifact is visible, and what blobs there are are whole."""
    monkeypatch.setenv("TESSERA_S3_ENDPOINT", server.endpoint)
    seen = opened(uri, tmp_path, "onlooker")
    assert seen.documents("artifacts/") == []
    for path in seen.documents("blobs/"):
        assert seen.backend.entry(path).sha256 == Path(path).name


PASSING = {
    "reset before the server hears": Fault("reset", "PUT", times=2),
    "reset on the way to the first look": Fault("reset", "GET", "never-exists", times=3),
    "reset of a part": Fault("reset", "PUT", "partNumber=2"),
    "reset when an upload begins": Fault("reset", "POST", "uploads="),
    "answer of a part lost": Fault("lose answer", "PUT", "partNumber=1"),
    "answer to the end of an upload lost": Fault("lose answer", "POST", "uploadId="),
    "busy": Fault("answer", times=5, status=503, code="SlowDown"),
    "busy, said by a web page": Fault("answer", "PUT", times=3, status=502),
    "internal error": Fault("answer", "POST", times=2, status=500, code="InternalError"),
    "good answer that ends with an error": Fault("answer", "POST", "uploadId=", status=200, code="InternalError"),
    "slow": Fault("delay", times=8, after=0.15),
    "bits changed on the way": Fault("flip", "PUT", "blobs/", times=3),
    "answer to a manifest lost": Fault("lose answer", "PUT", "artifacts/"),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_bridged_while_storing(
    s3_uri: str,
    proxy: FaultyProxy,
    source: Path,
    tmp_path: Path,
    fault: Fault,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket_store, "QUIET_S", 20.0)  # so that a slow machine does not make a short fault an outage
    proxy.faults = [Fault(**vars(fault))]
    digest = opened(s3_uri, tmp_path).put_folder(source, "model").digest
    assert proxy.faults[0].times == 0
    assert_whole(s3_uri, digest, tmp_path)
    assert not caplog.records  # too short for a word
    assert opened(s3_uri, tmp_path).documents("artifacts/") == [f"artifacts/{digest}.json"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset", "GET", "blobs/", times=3),
        Fault("cut", "GET", "blobs/", times=4, after=2.5 * bucket_store.CHUNK_BYTES),
        Fault("cut", "GET", "blobs/", times=2),
        Fault("cut", "GET", "artifacts/", times=2, after=17),
        Fault("trickle", "GET", "blobs/", times=2, after=0.02),
        Fault("answer", "GET", "blobs/", times=3, code="SlowDown"),
    ],
    ids=lambda fault: f"{fault.kind} {fault.path} {fault.after:.0f}",
)
def test_what_passes_is_bridged_while_reading(
    s3_uri: str, proxy: FaultyProxy, source: Path, tmp_path: Path, fault: Fault
) -> None:
    digest = opened(s3_uri, tmp_path).put_folder(source, "model").digest
    proxy.faults = [Fault(**vars(fault))]
    assert_whole(s3_uri, digest, tmp_path)
    assert proxy.faults[0].times == 0


def test_a_download_that_breaks_off_asks_only_for_the_rest(
    s3_uri: str, proxy: FaultyProxy, source: Path, tmp_path: Path
) -> None:
    digest = opened(s3_uri, tmp_path).put_folder(source, "model").digest
    store = opened(s3_uri, tmp_path, "elsewhere")
    blob = blob_path(hash_file(source / "weights").sha256)
    proxy.faults = [Fault("cut", "GET", blob, times=3, after=5 * bucket_store.CHUNK_BYTES)]
    assert (store.fetch(digest) / "weights").read_bytes() == LARGE
    asked = [int(range_.partition("=")[2].partition("-")[0]) for range_ in proxy.ranges if range_]
    assert len(asked) in (1, 2)  # of three answers of at most five chunks two are needed before the last one
    assert asked == sorted(asked)
    assert all(start >= 5 * bucket_store.CHUNK_BYTES for start in asked)


@pytest.mark.parametrize("answered", [True, False], ids=["answer lost", "never arrived"])
def test_a_claim_whose_answer_was_lost_is_still_ours_and_only_ours(
    s3_uri: str, proxy: FaultyProxy, tmp_path: Path, answered: bool
) -> None:
    proxy.faults = [Fault("lose answer" if answered else "reset", "PUT", "run.json")]
    assert opened(s3_uri, tmp_path).claim("runs/a/run.json", {"by": "us"})
    assert not opened(s3_uri, tmp_path, "elsewhere").claim("runs/a/run.json", {"by": "us"})
    assert proxy.faults[0].times == 0


def test_of_many_writers_of_one_key_one_wins_also_where_answers_are_lost(
    s3_uri: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.faults = [Fault("lose answer", "PUT", "run.json", times=3), Fault("reset", "PUT", "run.json", times=3)]
    stores, won = [opened(s3_uri, tmp_path, str(number)) for number in range(6)], []
    threads = [
        threading.Thread(target=lambda one=one: won.append(one.claim("runs/a/run.json", {"by": one.local.name})))
        for one in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 5 + [True]


def test_a_claim_that_met_another_under_way_is_made_again(s3_uri: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.faults = [Fault("answer", "PUT", "run.json", times=2, status=409, code="ConditionalRequestConflict")]
    assert opened(s3_uri, tmp_path).claim("runs/a/run.json", {"by": "us"})
    assert not opened(s3_uri, tmp_path, "elsewhere").claim("runs/a/run.json", {"by": "them"})


LASTING: dict[str, tuple[Fault, str]] = {
    "busy": (
        Fault("answer", times=999, code="SlowDown"),
        r"answers 503 \(SlowDown: told so\)\n  hint: its log has the cause",
    ),
    "gateway": (Fault("answer", "PUT", times=999, status=502), r"answers 502 \(<html>busy"),
    "resets": (Fault("reset", times=999), "cannot be reached"),
    "resets of parts": (Fault("reset", "PUT", "partNumber", times=999), "cannot be reached"),
    "full, by quota": (Fault("answer", "PUT", times=9, status=403, code="QuotaExceeded"), "no space left in bucket"),
    "full, by disk": (
        Fault("answer", "PUT", times=999, status=507, code="XMinioStorageFull"),
        r"no space left in bucket 'tessera': [\d,]+ bytes are needed \(XMinioStorageFull\)",
    ),
    "expired": (
        Fault("answer", "PUT", times=9, status=400, code="ExpiredToken"),
        r"refuses these credentials for bucket 'tessera' \(ExpiredToken\)(?s:.*)have not expired",
    ),
    "something new": (Fault("answer", "PUT", times=9, status=400, code="Strange"), "answers Strange: told so"),
    "bucket gone meanwhile": (
        Fault("answer", "PUT", times=9, status=404, code="NoSuchBucket"),
        "there is no bucket 'tessera' at 127.0.0.1",
    ),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("fault", "words"), LASTING.values(), ids=LASTING)
def test_what_lasts_is_one_error_and_a_later_run_heals_it(
    s3_uri: str,
    s3_server: S3Server,
    proxy: FaultyProxy,
    source: Path,
    tmp_path: Path,
    fault: Fault,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy.faults = [Fault(**vars(fault))]
    with pytest.raises(StoreError, match=words) as caught:
        opened(s3_uri, tmp_path).put_folder(source, "model")
    assert caught.value.hint or "Strange" in words
    assert_nothing_half(s3_uri, tmp_path, s3_server, monkeypatch)
    digest = opened(s3_uri, tmp_path).put_folder(source, "model").digest
    assert_whole(s3_uri, digest, tmp_path)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("hang", times=99), "cannot be reached: .*[Tt]imed out"),
        (Fault("hang", "GET", "blobs/", times=99), "cannot be reached: .*[Tt]imed out"),
        (Fault("cut", "GET", "blobs/", times=999), "breaks off its answers"),
        (Fault("answer", "GET", times=9, status=200), "is no S3 server"),
    ],
    ids=["hangs", "hangs on large answers", "always cut off", "a web page"],
)
def test_a_server_that_hangs_or_babbles_is_one_error_while_reading(
    s3_uri: str,
    proxy: FaultyProxy,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    words: str,
) -> None:
    digest = opened(s3_uri, tmp_path).put_folder(source, "model").digest
    proxy.faults = [Fault(**vars(fault))]
    with monkeypatch.context() as impatient:  # while the server answers, a busy machine may make it slow
        for name, value in (IMPATIENT | ({"READ_S": 0.3} if fault.kind == "hang" else {})).items():
            impatient.setattr(bucket_store, name, value)
        with pytest.raises(StoreError, match=words):
            opened(s3_uri, tmp_path, "elsewhere").fetch(digest)
    assert not list((tmp_path / "local" / "elsewhere").rglob("weights"))
    proxy.closing.set()
    proxy.faults = []
    assert_whole(s3_uri, digest, tmp_path)


class Clock:
    """The time that a request spends in pauses."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, pause_s: float) -> None:
        self.now += pause_s


def test_a_server_that_stays_away_is_asked_for_as_long_as_the_patience_lasts(
    s3_uri: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, clock = opened(s3_uri, tmp_path), Clock()
    monkeypatch.setattr(bucket_store, "QUIET_S", 0.1)
    monkeypatch.setattr(bucket_store, "time", clock)
    proxy.faults = [Fault("reset", times=99_999)]
    with pytest.raises(StoreError, match="cannot be reached"):
        store.documents("runs/")
    assert bucket_store.PATIENCE_S <= clock.now < bucket_store.PATIENCE_S + 2 * bucket_store.MAX_PAUSE_S


def test_a_server_killed_in_the_middle_of_an_upload_and_restarted_is_bridged(
    mortal: S3Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_store, "PATIENCE_S", PATIENCE_S)
    uri = fresh_prefix(mortal, monkeypatch)
    with faulty_proxy(mortal.endpoint) as proxy:
        monkeypatch.setenv("TESSERA_S3_ENDPOINT", proxy.endpoint)
        proxy.faults = [Fault("hang", "PUT", "partNumber=3")]

        def kill_and_restart() -> None:
            _wait_for(proxy, "partNumber=3")
            mortal.kill()
            proxy.closing.set()
            assert mortal.start()

        killer = threading.Thread(target=kill_and_restart)
        killer.start()
        digest = opened(uri, tmp_path).put_folder(source, "model").digest
        killer.join()
    monkeypatch.setenv("TESSERA_S3_ENDPOINT", mortal.endpoint)
    assert_whole(uri, digest, tmp_path)


def test_a_server_that_is_gone_is_waited_for_and_spoken_of(
    mortal: S3Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"PATIENCE_S": PATIENCE_S, "QUIET_S": 0.5}.items():
        monkeypatch.setattr(bucket_store, name, value)
    uri = fresh_prefix(mortal, monkeypatch)
    writer, reader = opened(uri, tmp_path), opened(uri, tmp_path, "elsewhere")
    digest = writer.put_folder(source, "model").digest
    mortal.kill()

    def messages(*parts: str) -> list[str]:
        texts = [record.getMessage() for record in caplog.records]
        return [text for text in texts if all(part in text for part in parts)]

    with caplog.at_level(logging.WARNING, "tessera"), ThreadPoolExecutor(2) as pool:
        fetched = pool.submit(reader.fetch, digest)
        claimed = pool.submit(writer.claim, "runs/a/run.json", {"while": "it is away"})
        waiting = ("cannot be reached", f"trying for {PATIENCE_S:.0f} s")
        wait_until("both have said so", lambda: len(messages(*waiting)) == 2)
        assert mortal.start()
        assert claimed.result()
        assert (fetched.result() / "weights").read_bytes() == LARGE
    assert len(messages("answers again, after ")) == 2


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_really_full_is_an_error_and_with_more_room_the_same_works(
    mortal: S3Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = fresh_prefix(mortal, monkeypatch)
    mortal.kill()
    mortal.start(volume_max=1, master_volumeSizeLimitMB=1)
    (source / "rows.jsonl").unlink()
    written = 0

    def fill() -> None:
        nonlocal written
        for number in range(99):
            (source / "weights").write_bytes(LARGE + bytes([number]))
            opened(uri, tmp_path).put_folder(source, "model")
            written += 1

    with pytest.raises(StoreError, match=r"answers 500 \(InternalError(?s:.*)out of space"):
        fill()
    assert find_faults(opened(uri, tmp_path)) == {}
    assert len(opened(uri, tmp_path).documents("artifacts/")) == written
    mortal.kill()
    mortal.start()
    digest = opened(uri, tmp_path).put_folder(source, "model").digest
    opened(uri, tmp_path, "elsewhere").verify(digest)


def test_an_upload_of_a_killed_writer_is_invisible_and_the_bucket_ends_it_by_a_rule(
    s3_uri: str, s3_server: S3Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = hash_file(source / "weights")
    script = (
        "import sys; from pathlib import Path; from components.core.store.store import open_store\n"
        "open_store(sys.argv[1]).put_folder(Path(sys.argv[2]), 'model')"
    )
    with faulty_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("TESSERA_S3_ENDPOINT", proxy.endpoint)
        proxy.faults = [Fault("hang", "PUT", "partNumber=2", times=9)]
        child = subprocess.Popen([sys.executable, "-c", script, s3_uri, str(source)], cwd=tmp_path)
        _wait_for(proxy, "partNumber=2")
        child.kill()
        child.wait()
    monkeypatch.setenv("TESSERA_S3_ENDPOINT", s3_server.endpoint)
    client, prefix = s3_server.client(), s3_uri.rpartition("/")[2]
    again = opened(s3_uri, tmp_path)
    assert blob_path(entry.sha256) not in again.documents("blobs/")
    client.delete_bucket_lifecycle(BUCKET)
    collect_garbage(again, dry_run=True)
    assert client.get_bucket_lifecycle(BUCKET) is None
    for _ in range(2):
        collect_garbage(again)
    collect_garbage(opened(f"{s3_uri}-other", tmp_path))
    rules = client.get_bucket_lifecycle(BUCKET).rules
    assert [rule.rule_filter.prefix for rule in rules] == [f"{prefix}/", f"{prefix}-other/"]
    assert {rule.abort_incomplete_multipart_upload.days_after_initiation for rule in rules} == {2}
    assert_whole(s3_uri, again.put_folder(source, "model").digest, tmp_path)


def test_a_clean_up_without_the_right_to_set_rules_says_so_and_goes_on(
    s3_uri: str, proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults = [Fault("answer", path="lifecycle", times=99, status=403, code="AccessDenied")]
    assert collect_garbage(opened(s3_uri, tmp_path))["blobs"] == 0
    (record,) = caplog.records
    assert record.getMessage().endswith("its lifecycle rule cannot be set (AccessDenied)")


def test_an_identity_that_may_only_read_reads_and_is_told_what_it_may_not(
    s3_uri: str, s3_server: S3Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = opened(s3_uri, tmp_path).put_folder(source, "model").digest
    key, secret = s3_server.reader
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert_whole(s3_uri, digest, tmp_path)
    reader = opened(s3_uri, tmp_path, "reader")
    (source / "new").write_text("new")
    uses: dict[str, Callable[[], Any]] = {
        "write to": lambda: reader.put_folder(source, "model"),
        "delete from": lambda: reader.backend.delete(f"artifacts/{digest}.json"),
    }
    for doing, use in uses.items():
        with pytest.raises(StoreError, match=rf"these credentials may not {doing} bucket 'tessera' \(AccessDenied\)"):
            use()
    assert reader.documents("artifacts/") == [f"artifacts/{digest}.json"]


USES: dict[str, Callable[[Store], Any]] = {
    "put": lambda store: store.claim("runs/a/run.json", {}),
    "head": lambda store: store.backend.stat("runs/a/run.json"),
    "list": lambda store: store.documents("runs/"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_off_by_an_hour_is_named(
    s3_uri: str,
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hours: int,
    use: Callable[[Store], Any],
) -> None:
    connected = opened(s3_uri, tmp_path)
    connected.documents("runs/")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
    words = rf"this machine's clock is 3,[56]\d\d s {'ahead of' if hours > 0 else 'behind'} the S3 server's"
    for each in (connected, opened(s3_uri, tmp_path)):
        proxy.faults = [Fault("answer", path="tessera", times=9, status=403, code="RequestTimeTooSkewed")]
        with pytest.raises(StoreError, match=words):
            use(each)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_keys_that_are_withdrawn_while_a_run_goes_on_are_named_as_the_cause(
    s3_uri: str, proxy: FaultyProxy, tmp_path: Path, use: Callable[[Store], Any]
) -> None:
    connected = opened(s3_uri, tmp_path)
    connected.documents("runs/")
    proxy.faults = [Fault("answer", times=9, status=403, code="InvalidAccessKeyId")]
    with pytest.raises(StoreError, match=r"refuses these credentials .* \(InvalidAccessKeyId\)"):
        use(connected)


def _wait_for(proxy: FaultyProxy, request: str) -> None:
    """Wait until a request has reached the proxy."""
    wait_until(request, lambda: any(request in seen for seen in proxy.seen), interval_s=0.01)
