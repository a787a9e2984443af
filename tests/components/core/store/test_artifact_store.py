"""Artifacts in a folder and behind a real S3 server: whole or absent, and every byte checked."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minio import Minio

from components.core.base.errors import CorruptArtifact, StoreError
from components.core.store import artifact_store, bucket_store, folder_store
from components.core.store import manifest as manifest_module
from components.core.store.artifact_store import blob_path
from components.core.store.manifest import SourceFile, describe, read_source
from components.core.store.store import Store, open_store
from components.core.store.verification import find_faults
from tests.waiting import wait_until

FILES = {"config.json": b"{}", "empty": b"", "nested/deep/weights.bin": b"\0\1\2" * 1000, "näme with space": b"x"}
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="._- "), min_size=1, max_size=8)
PATHS = st.lists(NAMES.filter(lambda name: name.strip(". ") == name), min_size=1, max_size=3).map("/".join)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def opened(uri: str, tmp_path: Path, machine: str = "here") -> Store:
    """The store as a fresh process on a machine would open it."""
    return open_store(uri, local=tmp_path / "local" / machine)


def overwrite(store: Store, path: str, data: bytes) -> None:
    """Change an object as a broken disk or a stranger would."""
    if store.backend.folder is None:
        bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
        server, key, secret = (
            os.environ[name] for name in ("TESSERA_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        )
        client = Minio(server.removeprefix("http://"), key, secret, secure=False, region="us-east-1")
        client.put_object(bucket, f"{prefix}/{path}", BytesIO(data), len(data))
    else:
        file = store.backend.folder / path
        file.chmod(0o644)
        file.write_bytes(data)


@pytest.fixture
def store(store_uri: str, tmp_path: Path) -> Store:
    return opened(store_uri, tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", FILES)


def test_a_folder_comes_back_as_it_was(store: Store, source: Path) -> None:
    manifest = store.put_folder(source, "model", {"family": "llama"})
    assert manifest == describe(source, "model", {"family": "llama"})
    assert store.manifest(manifest.digest) == manifest
    copy = store.fetch(manifest.digest)
    assert contents(copy) == FILES
    assert copy == store.local / "artifacts" / manifest.digest
    assert all(path.stat().st_mode & 0o222 == 0 for path in copy.rglob("*") if path.is_file())
    assert store.read(manifest.digest, "config.json") == b"{}"


def test_objects_lie_where_the_layout_says(store: Store, source: Path) -> None:
    digest = store.put_folder(source, "data").digest
    names = {sha256(data).hexdigest() for data in FILES.values()}
    assert store.documents("blobs/") == sorted(f"blobs/sha256/{name[:2]}/{name}" for name in names)
    assert store.documents("artifacts/") == [f"artifacts/{digest}.json"]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(PATHS, st.binary(max_size=64), max_size=4))
def test_any_folder_comes_back(store: Store, tmp_path: Path, files: dict[str, bytes]) -> None:
    folders = {parent.as_posix() for name in files for parent in list(Path(name).parents)[:-1]}
    files = {name: data for name, data in files.items() if name not in folders}
    folder = write(tmp_path / uuid.uuid4().hex, files)
    folder.mkdir(exist_ok=True)
    assert contents(store.fetch(store.put_folder(folder, "data").digest)) == files


def test_equal_folders_have_one_digest_and_metadata_counts(store: Store, source: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(source, tmp_path / "twin")
    assert store.put_folder(source, "data").digest == store.put_folder(twin, "data").digest
    assert store.put_folder(source, "data").digest != store.put_folder(source, "data", {"rows": 2}).digest


def test_the_second_fetch_reads_nothing_again(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digest = store.put_folder(source, "data").digest
    first = store.fetch(digest)

    def refuse(*_: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(artifact_store, "hash_file", refuse)
    monkeypatch.setattr(store.backend, "get_file", refuse)
    assert store.fetch(digest) == first
    with pytest.raises(AssertionError, match="read again"):
        opened(store.uri, tmp_path).fetch(digest)


def test_a_folder_store_links_its_working_copies(source: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    digest = store.put_folder(source, "data").digest
    blob = tmp_path / "store" / blob_path(sha256(b"{}").hexdigest())
    assert (store.fetch(digest) / "config.json").samefile(blob)
    assert blob.stat().st_mode & 0o777 == 0o444


def test_a_folder_store_copies_where_links_are_not_possible(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "store")
    digest = store.put_folder(source, "data").digest

    def other_disk(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    assert contents(store.fetch(digest)) == FILES


def test_blobs_that_are_there_are_not_sent_again(
    store: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_folder(source, "data")
    more = write(shutil.copytree(source, tmp_path / "more"), {"new": b"new"})
    sent: list[int] = []
    chunks = SourceFile.chunks

    def counted(self: SourceFile, chunk_bytes: int) -> Iterator[bytes]:
        sent.append(self.entry.size)
        return chunks(self, chunk_bytes)

    monkeypatch.setattr(SourceFile, "chunks", counted)
    store.put_folder(more, "data")
    assert sent == [3]


MIB = 1 << 20


@pytest.fixture(params=[5, 8])
def part_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Size of the parts of a file of 24 MiB, bytes."""
    monkeypatch.setattr(bucket_store, "PART_BYTES", request.param * MIB)
    return int(request.param * MIB)


def test_large_files_travel_in_bounded_memory(s3_uri: str, tmp_path: Path) -> None:
    """Of the whole process, obstore's buffers included."""
    size = 384 * MIB
    script = (
        "import sys, threading; from pathlib import Path; from components.core.store.store import open_store\n"
        "def peak(): return int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) << 10\n"
        "store = open_store(sys.argv[1], local=Path(sys.argv[3])); store.claim('runs/a', {}); before = peak()\n"
        "copy = store.fetch(store.put_folder(Path(sys.argv[2]), 'model').digest)\n"
        "print(peak() - before)"
    )
    source = write(tmp_path / "source", {"weights": b""})
    os.truncate(source / "weights", size)
    command = [sys.executable, "-c", script, s3_uri, str(source), str(tmp_path / "local")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < size // 2


@pytest.mark.parametrize("age_s", [0, 60])
def test_a_file_that_changes_while_it_is_stored_is_refused(
    age_s: float, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", {"log": b"abc"})
    written = time.time() - age_s
    os.utime(source / "log", (written, written))

    def hashed(path: Path) -> SourceFile:
        source = read_source(path)
        path.write_bytes(b"xyz")
        if age_s == 0:  # within the same tick of the clock
            os.utime(path, (written, written))
        return source

    monkeypatch.setattr(artifact_store, "read_source", hashed)
    with pytest.raises(StoreError, match="log changed while it was being stored"):
        store.put_folder(source, "data")
    assert store.documents("blobs/") == store.documents("artifacts/") == []


def truncate(file: IO[bytes]) -> None:
    file.truncate(5 * MIB)


def write_over_the_end(file: IO[bytes]) -> None:
    file.seek(23 * MIB)
    file.write(b"more")


@pytest.mark.parametrize("change", [truncate, write_over_the_end])
@pytest.mark.parametrize("written", [1e9, time.time() + 1e6], ids=["known by its stamp", "hashed again"])
def test_a_large_file_that_changes_on_its_way_to_a_server_is_refused(
    change: Callable[[Any], Any],
    written: float,
    s3_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part_bytes: int,
) -> None:
    source = write(tmp_path / "source", {"weights": bytes(24 * MIB)})
    os.utime(source / "weights", (written, written))
    pieces = itertools.count()

    def fault(name: str) -> None:
        if name == "object.part" and next(pieces) == 1:
            with (source / "weights").open("r+b") as file:
                change(file)

    monkeypatch.setattr(manifest_module, "fault_point", fault)
    store = opened(s3_uri, tmp_path)
    with pytest.raises(StoreError, match="weights changed while it was being stored"):
        store.put_folder(source, "data")
    assert store.documents("blobs/") == store.documents("artifacts/") == []


def test_a_writer_that_fails_half_way_leaves_no_artifact(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = store.backend.put_file

    def fail_on_weights(path: str, source: SourceFile) -> None:
        if source.entry.size > 1000:
            raise StoreError("gone")
        put_file(path, source)

    with monkeypatch.context() as broken:
        broken.setattr(store.backend, "put_file", fail_on_weights)
        with pytest.raises(StoreError, match="gone"):
            store.put_folder(source, "data")
    assert store.documents("artifacts/") == []
    assert contents(store.fetch(store.put_folder(source, "data").digest)) == FILES


def test_a_killed_writer_leaves_only_whole_objects(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {f"part-{number}": os.urandom(1 << 22) for number in range(12)})
    script = (
        "import sys; from pathlib import Path; from components.core.store.store import open_store\n"
        "store = open_store(sys.argv[1]); print('ready', flush=True); store.put_folder(Path(sys.argv[2]), 'data')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "store"), str(source)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"ready\n"
        wait_until("an object", lambda: any((tmp_path / "store" / "blobs").rglob("*")), interval_s=0.001)
        child.send_signal(signal.SIGKILL)
        child.wait()
    store = open_store(tmp_path / "store")
    for path in store.documents("blobs/"):
        assert sha256(store.backend.get(path) or b"").hexdigest() == Path(path).name
    assert find_faults(store) == {}
    store.verify(store.put_folder(source, "data").digest)


def test_two_writers_of_one_artifact_agree(store_uri: str, source: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = [opened(store_uri, tmp_path, str(number % 2)) for number in range(4)]
        digests = set(pool.map(lambda store: store.put_folder(source, "data").digest, stores))
        assert len(digests) == 1
        copies = list(pool.map(lambda store: contents(store.fetch(*digests)), stores))
    assert copies == [FILES] * 4


@pytest.mark.parametrize("data", [b"\0\1\3" * 1000, b"\0\1\2", b""], ids=["same size", "truncated", "emptied"])
def test_a_changed_blob_is_found_named_and_mended(store_uri: str, source: Path, tmp_path: Path, data: bytes) -> None:
    store = opened(store_uri, tmp_path, "elsewhere")
    digest = store.put_folder(source, "data").digest
    name, expected = "nested/deep/weights.bin", sha256(FILES["nested/deep/weights.bin"]).hexdigest()
    overwrite(store, blob_path(expected), data)
    for look in (Store.fetch, Store.verify, lambda store, digest: store.read(digest, name)):
        with pytest.raises(CorruptArtifact) as caught:
            look(opened(store_uri, tmp_path), digest)
        for part in (name, digest[:12], expected, sha256(data).hexdigest(), "hint: run the recipe again"):
            assert part in str(caught.value)
    assert set(find_faults(opened(store_uri, tmp_path))) == {digest, expected}
    assert not list((tmp_path / "local" / "here" / "artifacts").glob("*"))
    store.put_folder(source, "data")
    opened(store_uri, tmp_path).verify(digest)
    assert contents(opened(store_uri, tmp_path).fetch(digest)) == FILES


def test_a_missing_blob_is_named(store: Store, source: Path) -> None:
    digest = store.put_folder(source, "data").digest
    store.backend.delete(blob_path(sha256(b"{}").hexdigest()))
    for look in (store.fetch, store.verify, lambda digest: store.read(digest, "config.json")):
        with pytest.raises(StoreError, match=rf"file config\.json of artifact {digest[:12]} is missing in"):
            look(digest)
    assert "config.json" in find_faults(store)[digest]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace(b'"data"', b'"model"'), r"was changed: [0-9a-f]{64} expected, [0-9a-f]{64} found"),
        (lambda text: text[:-9], "cannot be read"),
        (lambda text: text.replace(b"config.json", b"../../escape"), "cannot be read"),
    ],
    ids=["another kind", "truncated", "a file outside"],
)
def test_a_changed_manifest_is_refused(
    store: Store, source: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    digest = store.put_folder(source, "data").digest
    path = f"artifacts/{digest}.json"
    overwrite(store, path, change(store.backend.get(path) or b""))
    with pytest.raises(CorruptArtifact, match=words):
        store.fetch(digest)
    assert list(find_faults(store)) == [digest]
    assert store.put_folder(source, "data") == store.manifest(digest)


def test_an_absent_artifact_is_an_error_with_the_store_in_it(store: Store) -> None:
    for look in (store.manifest, store.fetch, store.verify):
        with pytest.raises(StoreError, match=rf"no artifact {'0' * 12} in {store.uri}"):
            look("0" * 64)


def test_a_damaged_working_copy_is_brought_anew(s3_uri: str, source: Path, tmp_path: Path) -> None:
    store = opened(s3_uri, tmp_path)
    digest = store.put_folder(source, "data").digest
    copy = store.fetch(digest)
    for damage in ("removed", "changed", "added", "all gone"):
        match damage:
            case "removed":
                (copy / "config.json").unlink()
            case "changed":
                (copy / "config.json").chmod(0o644)
                (copy / "config.json").write_bytes(b"[]")
            case "added":
                (copy / "added").touch()
            case "all gone":
                shutil.rmtree(copy)
        assert contents(store.fetch(digest)) == FILES


def test_no_space_is_told_with_bytes_needed_and_free(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put_folder(source, "data").digest
    full = OSError(errno.ENOSPC, "No space left on device")

    def no_space(*_: Any) -> Any:
        raise full

    monkeypatch.setattr(folder_store, "hash_stream", no_space)
    monkeypatch.setattr(bucket_store, "hash_chunks", no_space)
    monkeypatch.setattr(os, "link", no_space)
    with pytest.raises(StoreError, match=r"3,003 bytes are needed, [\d,]+ are free\n  hint: free some"):
        store.fetch(digest)
    assert not list((store.local / "artifacts").iterdir())


def test_no_space_in_a_folder_store_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write(tmp_path / "source", {"small": b"abc", "large": bytes(9 * MIB)})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StoreError, match=r"no space left at .*: [\d,]+ bytes are needed"):
        open_store(tmp_path / "store").put_folder(source, "data")
    assert contents(tmp_path / "store") == {}
