"""What trust costs: transfers, cache hits, upkeep and resume points. `make bench-store OUT=file`.

Each comparison runs both sides in one go, in turn. Transfers go to a SeaweedFS server on this machine, so client and
server share its cores; the limit of the server is measured with raw parallel requests that check and keep nothing.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from components.core.store.garbage_collection import collect_garbage
from components.core.store.verification import find_faults
from tests.bench.rows import Row, in_turn, write_rows

CHECKPOINT_BYTES = 2 << 30
NUM_FILES = 32
"""Files of a checkpoint as Tessera writes it: one a sub-block."""
FILES_AT_A_TIME = 4
SERVER_MEMORY = "4GiB"
"""What the server may take: with the little that the tests allow it, collecting garbage would be most of its work."""
RAW_PART_BYTES = 32 << 20
RAW_REQUESTS = 8
"""Raw requests under way at a time."""
ROUNDS = 5
ARTIFACTS = (1_000, 3_000, 10_000)
BUCKET = "tessera"


def main() -> None:
    """Measure what was asked for, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--store", default=".tessera", help="store with a finished demo run, for cache and overhead")
    parser.add_argument("--only", choices=tuple(PARTS), action="append", help="measure only these")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
        for name in arguments.only or PARTS:
            rows += PARTS[name](Path(folder) / name, arguments.store)
    write_rows(rows, arguments.out)


def transfers(folder: Path, store_uri: str) -> list[Row]:
    """A checkpoint of 2 GiB to the server and back: the store, MinIO's client, boto3, and raw requests."""
    rows = _transfers_of(folder / "one", 1, "one file")
    return rows + _transfers_of(folder / "several", NUM_FILES, f"{NUM_FILES} files")


def _transfers_of(folder: Path, num_files: int, shape: str) -> list[Row]:
    """The same for a checkpoint of so many files."""
    from tests.s3_server import running_server

    (folder / "model").mkdir(parents=True)
    for number in range(num_files):
        with (folder / "model" / f"{number:02}.safetensors").open("wb") as sink:
            for _ in range((CHECKPOINT_BYTES >> 20) // num_files):
                sink.write(os.urandom(1 << 20))
    with (
        running_server(lambda: Path(tempfile.mkdtemp(dir=folder)), memory=SERVER_MEMORY) as server,
        mock.patch.dict(os.environ, server.environment),
    ):
        sides = _Sides(folder, server.client(), server)
        rows = []
        for way, told in (("up", f"upload 2 GiB in {shape}"), ("down", f"download 2 GiB in {shape}")):
            rows += _compared(told, in_turn({name: sides.timed(name, way) for name in sides.names}, ROUNDS))
            busy = {name: statistics.median(sides.busy_s[name, way]) for name in sides.names}
            rows += [
                Row(f"{told}, {name}, cores' time", 2**30 * s / CHECKPOINT_BYTES, "s/GiB") for name, s in busy.items()
            ]
    shutil.rmtree(folder)
    return rows


class _Sides:
    """Each side's way to move the files; every upload is removed before the next, every download too."""

    names = ("store", "minio", "boto3", "raw")

    def __init__(self, folder: Path, client: Any, server: Any) -> None:
        import boto3

        self.folder, self.client = folder, client
        self.files = sorted((folder / "model").iterdir())
        self.boto3 = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=server.key,
            aws_secret_access_key=server.secret,
            region_name="us-east-1",
        )
        self.digest = ""
        self.busy_s: dict[tuple[str, str], list[float]] = {}

    def timed(self, side: str, way: str) -> Callable[[], float]:
        """One measurement, megabytes a second; the time that cores worked for this process is noted, all threads."""
        move, clean = getattr(self, f"_{side}_{way}"), self._empty_bucket if way == "up" else self._remove_downloads

        def measure() -> float:
            clean()
            if way == "down":
                self._fill(side)
            os.sync()
            start, busy = time.perf_counter(), time.process_time()
            move()
            seconds = time.perf_counter() - start
            self.busy_s.setdefault((side, way), []).append(time.process_time() - busy)
            return CHECKPOINT_BYTES / 1e6 / seconds

        return measure

    def _fill(self, side: str) -> None:
        """What is downloaded is there, by the same side's upload."""
        if not self._uploaded(side):
            getattr(self, f"_{side}_up")()

    def _uploaded(self, side: str) -> bool:
        prefix = {"store": "store/blobs/", "raw": "raw/"}.get(side, side)
        found: int = sum(one.size for one in self.client.list_objects(BUCKET, prefix=prefix, recursive=True))
        return found >= CHECKPOINT_BYTES

    def _store_up(self) -> None:
        self.digest = self._open().put_folder(self.folder / "model", "model").digest

    def _store_down(self) -> None:
        self._open().fetch(self.digest)

    def _open(self) -> Any:
        from components.core.store.store import open_store

        return open_store(f"s3://{BUCKET}/store", local=self.folder / "down")

    def _minio_up(self) -> None:
        self._each(lambda file: self.client.fput_object(BUCKET, f"minio/{file.name}", str(file)))

    def _minio_down(self) -> None:
        self._each(lambda file: self.client.fget_object(BUCKET, f"minio/{file.name}", str(self._target(file))))

    def _boto3_up(self) -> None:
        self._each(lambda file: self.boto3.upload_file(str(file), BUCKET, f"boto3/{file.name}"))

    def _boto3_down(self) -> None:
        self._each(lambda file: self.boto3.download_file(BUCKET, f"boto3/{file.name}", str(self._target(file))))

    def _each(self, move: Callable[[Path], object]) -> None:
        """As many files at a time as the store moves."""
        with ThreadPoolExecutor(FILES_AT_A_TIME) as threads:
            list(threads.map(move, self.files))

    def _target(self, file: Path) -> Path:
        return self.folder / "down" / file.name

    def _raw_up(self) -> None:
        """Objects of 32 MiB, each one request with an address signed beforehand."""
        import urllib3

        data = os.urandom(RAW_PART_BYTES)
        pool = urllib3.PoolManager(maxsize=RAW_REQUESTS)

        def put(url: str) -> None:
            assert pool.request("PUT", url, body=data).status == 200

        with ThreadPoolExecutor(RAW_REQUESTS) as threads:
            list(threads.map(put, [self._signed("put", number) for number in range(self._num_raw)]))

    def _raw_down(self) -> None:
        import urllib3

        pool = urllib3.PoolManager(maxsize=RAW_REQUESTS)

        def get(url: str) -> None:
            response = pool.request("GET", url, preload_content=False)
            assert sum(map(len, response.stream(1 << 20))) == RAW_PART_BYTES
            response.release_conn()

        with ThreadPoolExecutor(RAW_REQUESTS) as threads:
            list(threads.map(get, [self._signed("get", number) for number in range(self._num_raw)]))

    @property
    def _num_raw(self) -> int:
        return CHECKPOINT_BYTES // RAW_PART_BYTES

    def _signed(self, way: str, number: int) -> str:
        sign = getattr(self.client, f"presigned_{way}_object")
        return str(sign(BUCKET, f"raw/{number}", expires=timedelta(hours=1)))

    def _empty_bucket(self) -> None:
        from minio.deleteobjects import DeleteObject

        names = [DeleteObject(found.object_name) for found in self.client.list_objects(BUCKET, recursive=True)]
        list(self.client.remove_objects(BUCKET, names))

    def _remove_downloads(self) -> None:
        shutil.rmtree(self.folder / "down", ignore_errors=True)
        (self.folder / "down").mkdir()


def _compared(way: str, speeds: dict[str, float]) -> list[Row]:
    """The store's speed against the faster client and against the server's limit."""
    ours, raw = speeds["store"], speeds["raw"]
    best = max(("minio", "boto3"), key=speeds.__getitem__)
    return [
        Row(f"{way}, digest checked", ours, "MB/s", f"{best}: {speeds[best]:.0f} MB/s", ours / speeds[best]),
        Row(f"{way}, share of the server's limit", ours, "MB/s", f"raw requests: {raw:.0f} MB/s", ours / raw),
        *(Row(f"{way}, {name}", speeds[name], "MB/s") for name in ("minio", "boto3", "raw")),
    ]


def cache_hit(folder: Path, store_uri: str) -> list[Row]:
    """A finished demo run, run again: time of the command, and bytes read for each byte there is."""
    import subprocess
    import sys

    from components.core.store.store import open_store

    subprocess.run(["sync"], check=True)
    dropped = _drop_page_cache()
    start = time.perf_counter()
    command = [
        str(Path(sys.executable).with_name("tessera")),
        "run",
        "pipelines/recipes/demo.yaml",
        "--store",
        store_uri,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    read, there = _bytes_verified(open_store(store_uri))
    return [
        Row("cache hit of the demo, verified", seconds, "s", "limit of 20 s, " + ("cold" if dropped else "warm")),
        Row(
            "bytes read in verifying a run", read / 1e6, "MB", f"{there / 1e6:.1f} MB of different blobs", read / there
        ),
    ]


def _drop_page_cache() -> bool:
    """Have the kernel forget the files it keeps in memory, where it may be asked."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def _bytes_verified(store: Any) -> tuple[int, int]:
    """Bytes that verifying the latest run's stages reads in one process, and bytes of the different blobs it names."""
    from components.core.runtime.runner import load_verified_record
    from pipelines.records.runs import find_run, stage_documents

    read = 0
    whole = store.backend.entry

    def entry(path: str) -> Any:
        nonlocal read
        found = whole(path)
        read += found.size
        return found

    store.backend.entry = entry
    blobs: dict[str, int] = {}
    for document in stage_documents(store, find_run(store, "latest")).values():
        record = load_verified_record(store, document["key"])
        assert record is not None, f"{document['label']} is not whole"
        for digest in record.outputs.values():
            blobs |= {found.sha256: found.size for found in store.manifest(digest).files.values()}
    return read, sum(blobs.values())


UPKEEP: dict[str, Callable[[Any], object]] = {
    "list": lambda store: list(store.backend.list("artifacts/")),
    "verify": lambda store: find_faults(store),
    "gc": lambda store: collect_garbage(store, dry_run=True),
}


def assembly(folder: Path, store_uri: str) -> list[Row]:
    """Bytes of the latest run's child that were stored anew, and not shared with the parent and the library."""
    from components.core.store.store import open_store
    from pipelines.records.runs import find_run, stage_documents

    store = open_store(store_uri)
    records = {
        name: store.stage_record(document["key"])
        for name, document in stage_documents(store, find_run(store, "latest")).items()
    }

    def weights(digest: str) -> dict[str, int]:
        files = store.manifest(digest).files
        return {entry.sha256: entry.size for name, entry in files.items() if name.endswith(".safetensors")}

    sources = [record for name, record in records.items() if record and name.startswith(("parent", "search/library"))]
    there = {blob for record in sources for digest in record.outputs.values() for blob in weights(digest)}
    search = records["search"]
    assert search is not None
    child = weights(search.outputs["child"])
    new, whole = sum(size for blob, size in child.items() if blob not in there), sum(child.values())
    return [Row("weights stored anew to assemble the child", new / 1e6, "MB", f"{whole / 1e6:.2f} MB", new / whole)]


def upkeep(folder: Path, store_uri: str) -> list[Row]:
    """Listing, checking the manifests of, and cleaning up a store, by its number of artifacts."""
    from components.core.store.store import open_store

    rows: list[Row] = []
    seconds: dict[str, list[float]] = {}
    store = open_store(folder / "many")
    made = 0
    for count in ARTIFACTS:
        for number in range(made, count):
            source = folder / "source"
            source.mkdir(parents=True, exist_ok=True)
            (source / "table.json").write_text(f'{{"number": {number}}}')
            store.put_folder(source, "table")
        made = count
        for name, act in UPKEEP.items():
            opened = open_store(folder / "many")
            start = time.perf_counter()
            act(opened)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    for name, (small, _, large) in seconds.items():
        growth = (large / small) / (ARTIFACTS[-1] / ARTIFACTS[0])
        versus = f"{small:.3f} s for {ARTIFACTS[0]:,}; growth over linear"
        rows.append(Row(f"{name} of {ARTIFACTS[-1]:,} artifacts", large, "s", versus, growth))
    return rows


def resume_points(folder: Path, store_uri: str) -> list[Row]:
    """Time that the training loop stands still for a resume point, as a share of the interval between two."""
    import torch

    from components.core.model.checkpoint import model_config
    from components.core.model.decoder import TesseraForCausalLM
    from components.core.runtime.context import quiet_context
    from components.core.runtime.resume import MIN_INTERVAL_S
    from components.core.training.checkpoints import save_point
    from components.core.training.loop import adamw

    rows = []
    for name, hidden, layers in (("demo's parent", 128, 12), ("67 M parameters", 512, 16)):
        values = {
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
        model = TesseraForCausalLM(model_config(values))
        optimizer = adamw(model, 1e-3)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        context = quiet_context(folder / str(hidden))
        stood = []
        for step in range(5):
            start = time.perf_counter()
            save_point(context, step, model, optimizer, {})
            stood.append(time.perf_counter() - start)
            context.resume.wait()  # it is written while training goes on, long before the next
        value = statistics.median(stood)
        interval = MIN_INTERVAL_S
        rows.append(Row(f"resume point, {name}", value, "s", f"interval of {interval:.0f} s", value / interval))
    return rows


def overhead(folder: Path, store_uri: str) -> list[Row]:
    """Time of the latest run that was not spent in a stage's own code: starts, checks, hashing, waiting, records.

    Stages that ran side by side count once, by the longer one.
    """
    from components.core.store.store import open_store
    from pipelines.records.runs import find_run, run_record, stage_documents

    store = open_store(store_uri)
    run = next(r for r in _runs_newest_first(store) if not any(d["cached"] for d in stage_documents(store, r).values()))
    record, documents = run_record(store, run), list(stage_documents(store, run).values())
    in_stages = _covered([(document["started"], document["finished"]) for document in documents])
    around_work = 0.0
    for document in documents:
        made = store.stage_record(document["key"])
        assert made is not None
        around_work += document["seconds"] - made.work_seconds
    outside = record["seconds"] - in_stages
    total = outside + around_work
    versus = f"the {record['seconds']:.0f} s of {find_run(store, run)}"
    return [
        Row("overhead: tasks begun and ended", outside, "s", versus, outside / record["seconds"]),
        Row("overhead: inputs, outputs, records", around_work, "s", versus, around_work / record["seconds"]),
        Row("overhead a stage", total / len(documents), "s", f"{len(documents)} stages", None),
    ]


def _runs_newest_first(store: Any) -> list[str]:
    from pipelines.records.runs import run_records

    return [record["run"] for record in reversed(run_records(store)) if record["status"] == "succeeded"]


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of some spans of time, s."""
    covered, end = 0.0, 0.0
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


PARTS: dict[str, Callable[[Path, str], list[Row]]] = {
    "transfers": transfers,
    "cache-hit": cache_hit,
    "assembly": assembly,
    "upkeep": upkeep,
    "resume-points": resume_points,
    "overhead": overhead,
}

if __name__ == "__main__":
    main()
