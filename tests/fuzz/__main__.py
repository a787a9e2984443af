"""Coverage-guided fuzzing of whatever reads a stranger's bytes: `make fuzz SECONDS=600`, where atheris is installed.

Each target runs in a process of its own, whose fuzzer also ends what hangs for ten seconds or takes 2 GiB. An error of
ours is what is wanted; any other fails the target, and leaves its input in a file that the output names.
"""

import contextlib
import importlib.util
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S, MEMORY_MIB = 10, 2048


def safetensors(data: bytes, folder: Path) -> None:
    """A header, its length as said or as is."""
    from components.core.model.weight_index import read_header

    header = data[1:]
    length = struct.pack("<Q", len(header)) if data[:1] < b"\x80" else b""
    (folder / "w.safetensors").write_bytes(length + header + bytes(32))
    read_header(folder / "w.safetensors")


def configuration(data: bytes, folder: Path) -> None:
    """A model's configuration."""
    from components.core.model.inspection import check_checkpoint, inspect_checkpoint

    (folder / "config.json").write_bytes(data)
    inspect_checkpoint(folder)
    check_checkpoint(folder)


def tokenizer(data: bytes, folder: Path) -> None:
    """What a plan looks at of a tokenizer."""
    from components.core.text.tokenizer_files import read_settings

    vocabulary, _, told = data.partition(b"\xff")
    (folder / "tokenizer.json").write_bytes(vocabulary)
    (folder / "tokenizer_config.json").write_bytes(told or b'{"eos_token": "a"}')
    read_settings(folder)


def rows(data: bytes, folder: Path) -> None:
    """Rows of a user's own."""
    from components.data.own_files import chat_rows, problem_rows
    from tests.components.data.whole_corpus import corpus_rows

    (folder / "rows").mkdir(exist_ok=True)
    (folder / "rows" / "rows.jsonl").write_bytes(data)
    for read in (chat_rows, corpus_rows, problem_rows):
        json.dumps(read(folder / "rows", skip_bad=True), ensure_ascii=False).encode()


def manifest(data: bytes, folder: Path) -> None:
    """A manifest; whatever name it has stays below its folder."""
    from components.core.store.manifest import Manifest

    try:
        found = Manifest.model_validate_json(data)
    except ValueError:
        return
    for name in found.files:
        assert (folder / name).resolve().is_relative_to(folder.resolve()), name


def record(data: bytes, folder: Path) -> None:
    """A stage record and a document of a run, sealed or not."""
    from components.core.store.checksummed_json import seal
    from components.core.store.store import open_store, record_path

    store, key = open_store(folder), "ab" * 32
    try:
        sealed = seal(record_path(key), json.loads(data))
    except (ValueError, TypeError, RecursionError):
        sealed = data
    store.backend.put(record_path(key), sealed)
    assert store.stage_record(key) is None or json.loads(data)["key"] == key
    store.read_document_or_none("runs/a/run.json")


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    target.__name__: target for target in (safetensors, configuration, tokenizer, rows, manifest, record)
}
SEEDS: dict[str, list[bytes]] = {
    "safetensors": [b'\0{"a":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]},"__metadata__":{"format":"pt"}}'],
    "configuration": [
        b'{"model_type":"llama","vocab_size":8,"hidden_size":4,"intermediate_size":8,"num_hidden_layers":2,'
        b'"num_attention_heads":2,"num_key_value_heads":1,"rope_scaling":{"rope_type":"default"}}',
        b'{"model_type":"nemotron-nas","vocab_size":8,"hidden_size":4,"num_hidden_layers":1,"num_attention_heads":2,'
        b'"block_configs":[{"attention":{"no_op":false,"n_heads_in_group":2},"ffn":{"intermediate_size":8}}]}',
    ],
    "tokenizer": [b'{"added_tokens":[{"content":"a"}],"model":{"type":"BPE","vocab":{"a":0}}}\xff{"eos_token":"a"}'],
    "rows": [
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"<think>b</think>c"}]}\n',
        b'{"question":"1+1","answer":"2","level":1}\n{"text":"words"}\n{"input":"a","output":"b","reasoning":"off"}\n',
    ],
    "manifest": [b'{"kind":"data","files":{"a/b":{"sha256":"%s","size":1}},"metadata":{}}' % (b"0" * 64)],
    "record": [b'{"key":"k","stage":"s","config":{},"code":"c","inputs":{"a":["b"]},"outputs":{"o":"d"}}'],
}


def fuzz(name: str, corpus: Path, seconds: int) -> None:
    """Fuzz one target in this process until its time is over."""
    import atheris

    with atheris.instrument_imports(include=["components", "json"]):
        import components.core.model.inspection
        import components.core.store.store
        import components.core.text.tokenizer_files
        import components.data.own_files  # noqa: F401
    from components.core.base.errors import TesseraError

    folder = Path(tempfile.mkdtemp(dir=corpus))

    def one(data: bytes) -> None:
        with contextlib.suppress(TesseraError):
            TARGETS[name](data, folder)

    options = [f"-max_total_time={seconds}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MIB}", "-max_len=4096"]
    seeds = corpus / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(SEEDS[name]):
        (seeds / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", "-print_final_stats=1", str(seeds)], one)
    atheris.Fuzz()


def main(seconds: int) -> int:
    """Fuzz all targets one after the other; returns 1 where one failed."""
    if importlib.util.find_spec("atheris") is None:
        sys.stdout.write("atheris is not installed\n  hint: uv pip install atheris\n")
        return 2
    failed = []
    for name in TARGETS:
        with tempfile.TemporaryDirectory(prefix="tessera-fuzz-") as corpus:
            command = [sys.executable, "-m", "tests.fuzz", name, corpus, str(max(1, seconds // len(TARGETS)))]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
        inputs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        peak = re.search(r"peak_rss_mb: +(\d+)", done.stderr)
        sys.stdout.write(
            f"{name}: {inputs[1] if inputs else 'no count of'} inputs, peak {peak[1] if peak else '?'} MiB, "
            f"exit code {done.returncode}\n"
        )
        if done.returncode:
            failed.append(name)
            sys.stdout.write(done.stderr[-4000:])
    return int(bool(failed))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        fuzz(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main(int(sys.argv[1])))
