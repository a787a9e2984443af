"""Checkpoints, data and stores made by strangers: an error of ours, never a crash, a hang, or memory without bound."""

import ast
import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import components
import pipelines
from components.core.base.config import canonical_json
from components.core.base.errors import CheckpointError, CorruptArtifact, DataError, StoreError, TesseraError
from components.core.model.inspection import check_checkpoint, inspect_checkpoint
from components.core.model.weight_index import WEIGHT_DTYPES, read_header
from components.core.store import object_store
from components.core.store.checksummed_json import seal, unseal
from components.core.store.garbage_collection import collect_garbage
from components.core.store.manifest import MAX_NAME_BYTES, MAX_PATH_BYTES, FileEntry, Manifest
from components.core.store.store import open_store, record_path
from components.core.store.verification import find_faults
from components.core.text import row_files as rows
from components.core.text.jsonl import read_user_rows
from components.core.text.tokenizer import add_toggle, train_tokenizer
from components.data.own_files import chat_rows, problem_rows
from tests.components.data.whole_corpus import corpus_rows

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
DEEP = b"[" * 100_000
BOUND = 64
"""Memory that is taken at most, in times of what is read."""

fuzz = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document are."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in paths_in(inner, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    """The document with another value at a place."""
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


def mutations(document: Any, places: int = 3) -> st.SearchStrategy[Any]:
    """The document with some values replaced by others of any kind."""
    paths = paths_in(document)[1:]

    def mutate(changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
        changed = document
        for path, by in changes:
            try:
                changed = replaced(changed, path, by)
            except (TypeError, LookupError):  # an earlier change took its place away
                continue
        return changed

    return st.lists(st.tuples(st.sampled_from(paths), JSON), min_size=1, max_size=places).map(mutate)


def refusal(kind: type[TesseraError] | tuple[type[TesseraError], ...], do: Callable[[], object]) -> str:
    """What an error of ours says; nothing where there was none. Any other error fails the test."""
    try:
        do()
    except kind as error:
        return error.message
    return ""


def peak_bytes(do: Callable[[], object]) -> int:
    """Memory that Python takes while something is done."""
    tracemalloc.start()
    try:
        do()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Safetensors


def tensor_file(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def accepts(path: Path) -> bool:
    """Whether a file is accepted; if it is, loading it gives tensors of the same names and shapes."""
    try:
        header = read_header(path)
    except CheckpointError:
        return False
    if any(dtype not in WEIGHT_DTYPES for dtype, _ in header.values()):
        return False
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
    assert shapes == {name: shape for name, (_, shape) in header.items()}
    return True


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HEADER = {"a": ENTRY, "b": {**ENTRY, "shape": [2], "data_offsets": [24, 32]}, "__metadata__": {"format": "pt"}}


@fuzz
@given(header=st.one_of(mutations(HEADER), JSON), extra=st.integers(-3, 3))
def test_safetensors_headers_of_any_json(tmp_path: Path, header: Any, extra: int) -> None:
    path = tensor_file(tmp_path / "w.safetensors", json.dumps(header).encode(), bytes(32 + extra))
    assert not accepts(path) or extra == 0


@fuzz
@given(data=st.binary(max_size=64), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_safetensors_files_of_any_bytes(tmp_path: Path, data: bytes, length: int | None) -> None:
    accepts(tensor_file(tmp_path / "w.safetensors", data, length=length))


@fuzz
@given(place=st.integers(0, 10**6), mask=st.integers(1, 255), cut=st.integers(0, 200))
def test_safetensors_files_with_a_changed_byte(tmp_path: Path, place: int, mask: int, cut: int) -> None:
    path = tensor_file(tmp_path / "w.safetensors", json.dumps(HEADER).encode(), bytes(32))
    whole = path.read_bytes()
    assert accepts(path)
    changed = bytearray(whole)
    changed[place % len(whole)] ^= mask
    path.write_bytes(changed)
    accepts(path)
    path.write_bytes(whole[: max(0, len(whole) - 1 - cut)])
    assert not accepts(path)


def test_a_header_that_names_a_weight_twice_is_read_as_the_loader_reads_it(tmp_path: Path) -> None:
    entries = [json.dumps({**ENTRY, "shape": shape, "data_offsets": [0, 24]}) for shape in ([2, 3], [6])]
    header = ",".join(f'"a":{entry}' for entry in entries)
    assert accepts(tensor_file(tmp_path / "w.safetensors", f"{{{header}}}".encode(), bytes(24)))


SIZE = 2 << 20
BOMBS = {
    "a list": b"[]",
    "deep": b"[" * SIZE,
    "many lists": b'{"a":[' + b"[]," * (SIZE // 3) + b"[]]}",
    "many names": b"{" + b",".join(b'"%d":1' % number for number in range(SIZE // 10)) + b"}",
    "many dimensions": b'{"a":{"dtype":"F32","shape":[' + b"9," * (SIZE // 2) + b'9],"data_offsets":[0,0]}}',
    "large sizes": b'{"a":{"dtype":"F32","shape":[' + (b"9" * 4000 + b",") * 400 + b'9],"data_offsets":[0,0]}}',
    "a very large number": b'{"a":{"dtype":"F32","shape":[' + b"9" * SIZE + b'],"data_offsets":[0,0]}}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_takes_memory_and_time_within_a_bound(tmp_path: Path, name: str) -> None:
    path = tensor_file(tmp_path / "w.safetensors", BOMBS[name])
    assert peak_bytes(lambda: accepts(path)) < BOUND * SIZE
    assert not accepts(path)


LARGEST = """
import resource, struct, sys
from pathlib import Path
from components.core.model.weight_index import MAX_HEADER_BYTES, read_header

entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
header = b",".join(entry % number for number in range(MAX_HEADER_BYTES // 60))
path = Path(sys.argv[1])
path.write_bytes(struct.pack("<Q", len(header) + 2) + b"{" + header + b"}")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(read_header(path)) > 100_000
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * MAX_HEADER_BYTES / 1024
"""


def test_the_largest_header_takes_memory_within_a_bound(tmp_path: Path) -> None:
    """In a process of its own: the library's memory is not Python's."""
    subprocess.run([sys.executable, "-c", LARGEST, str(tmp_path / "w.safetensors")], check=True)


def test_a_header_of_any_length_is_not_read(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "w.safetensors", b"{}", length=(1 << 30) - 8)
    os.truncate(path, 1 << 30)  # takes no room on the disk
    assert peak_bytes(lambda: accepts(path)) < 1 << 20
    assert not accepts(path)


# Configurations

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": None,
    "layer_types": ["full_attention"] * 2,
    "tie_word_embeddings": False,
}
ATTENTION, FFN = {"no_op": False, "n_heads_in_group": 2}, {"no_op": False, "intermediate_size": 8}
NAS = LLAMA | {"model_type": "nemotron-nas", "block_configs": [{"attention": ATTENTION, "ffn": FFN}] * 2}
MISTRAL = LLAMA | {"model_type": "mistral", "use_sliding_window": True, "max_window_layers": 1}


@fuzz
@given(config=st.one_of(st.sampled_from([LLAMA, NAS, MISTRAL]).flatmap(mutations), JSON))
def test_configurations_of_any_json(tmp_path: Path, config: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").touch()
    for look in (check_checkpoint, inspect_checkpoint):
        assert len(refusal(CheckpointError, partial(look, tmp_path))) < 10_000


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        b'{"a":' * 50_000,
        b"\xff\xfe{}",
        b"",
        b"[]",
        json.dumps(LLAMA | {"num_hidden_layers": 10**12}).encode(),
        json.dumps(LLAMA | {"num_hidden_layers": float("inf")}).encode(),
        json.dumps(LLAMA | {"hidden_size": 10**18}).encode(),
        json.dumps(LLAMA).replace("10000.0", "9" * 5000).encode(),
    ],
    ids=["deep", "deep objects", "binary", "empty", "a list", "layers", "endless layers", "wide", "a long number"],
)
def test_configurations_that_would_take_all_memory(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)

    def look() -> None:
        with pytest.raises(CheckpointError):
            check_checkpoint(tmp_path)

    assert peak_bytes(look) < 64 << 20


# Tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["1+1=2"], 290, folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["model"]["vocab"] = dict(list(described["model"]["vocab"].items())[:12])
    described["model"]["merges"] = []
    described["added_tokens"] = described["added_tokens"][:2]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tokenizers_of_any_json(
    tokenizer: Path, tmp_path: Path, data: st.DataObject, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        document = json.loads((tokenizer / name).read_text())
        changed = data.draw(st.one_of(st.just(document), mutations(document), JSON))
        (source / name).write_text(json.dumps(changed))
    assert len(refusal(CheckpointError, lambda: add_toggle(source, out))) < 10_000


def test_a_panic_of_the_tokenizers_library_is_an_error(
    tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    described = json.loads((tokenizer / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_bytes((tokenizer / "tokenizer_config.json").read_bytes())
    with pytest.raises(CheckpointError, match="cannot be read: Precompiled"):
        add_toggle(tmp_path, tmp_path / "out")
    assert "panicked" in capfd.readouterr().err


def test_a_tokenizer_that_is_no_document(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes((tokenizer / "tokenizer_config.json").read_bytes())
    for text in (DEEP, b"\0", b"\xff", b""):
        (tmp_path / "tokenizer.json").write_bytes(text)
        with pytest.raises(CheckpointError):
            add_toggle(tmp_path, tmp_path / "out")


# Rows

CHAT = {
    "messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "<think>1</think>2"}],
    "reasoning": "on",
}
POST_TRAINING = {"input": [{"role": "user", "content": "1+1"}], "output": "2", "reasoning": "off", "system_prompt": "x"}
PROBLEM = {"question": "1+1", "answer": "2", "level": 1, "id": "a"}
TEXT = {"text": "words"}
ROW = st.one_of(
    st.sampled_from([CHAT, POST_TRAINING, PROBLEM, TEXT]).flatmap(mutations).map(json.dumps).map(str.encode),
    st.binary(max_size=40),
    JSON.map(json.dumps).map(str.encode),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(ROW, min_size=1, max_size=6))
def test_rows_of_any_bytes(tmp_path: Path, lines: list[bytes]) -> None:
    folder = tmp_path / "rows"
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    for read in (corpus_rows, chat_rows, problem_rows):
        for skip_bad in (False, True):
            found: list[Any] = []
            told = refusal(DataError, lambda: found.extend(read(folder, skip_bad=skip_bad)[0]))  # noqa: B023
            assert len(told) < 10_000
            json.dumps(found, ensure_ascii=False).encode()


def test_rows_that_are_deep_or_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 200_000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(DEEP + b"\n" + b'{"text":"' + b"x" * 500_000 + b'"}\n' + b'{"text":"good"}\n' + b"x" * 500_000)
    found, bad = read_user_rows([path], dict, skip_bad=True)
    assert (found, bad) == ([{"text": "good"}], 3)
    with pytest.raises(DataError, match=r"line 1: nested too deeply; .* line 2: longer than 200,000 bytes"):
        read_user_rows([path], dict, skip_bad=False)


# Manifests, records, documents

ENTRY_OF_NOTHING = FileEntry(sha256=sha256(b"").hexdigest(), size=0)


def manifest(*names: str) -> Manifest:
    return Manifest(kind="data", files=dict.fromkeys(names, ENTRY_OF_NOTHING))


@fuzz
@given(name=st.text(st.sampled_from("ab./\\:\0C~ é\ud800"), max_size=12))
def test_whatever_name_is_taken_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    try:
        manifest(name)
    except ValueError:
        return
    inside = tmp_path / "folder"
    assert (inside / name).resolve().is_relative_to(inside)
    assert (inside / name).resolve() == inside / name
    elsewhere = PureWindowsPath(name)
    assert not elsewhere.anchor
    assert ".." not in elsewhere.parts


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/etc/passwd", "a/../../b", "a/..", "./a", "a//b", "a/", "//a", "a\0b"),
        *("\\\\host\\share", "..\\a", "C:\\a", "c:a", "a\\b", "\ud800"),
        *("x" * (MAX_NAME_BYTES + 1), "x/" * (MAX_PATH_BYTES // 2) + "x"),
    ],
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="files"):
        manifest(name)


def test_a_file_is_no_folder_and_case_counts() -> None:
    with pytest.raises(ValueError, match="is a file and a folder"):
        manifest("a", "a/b")
    assert set(manifest("a", "A", "b/a", "é", "a b").files) == {"a", "A", "b/a", "é", "a b"}


@fuzz
@given(document=mutations({"kind": "data", "files": {"a": {"sha256": "0" * 64, "size": 1}}, "metadata": {"a": 1}}))
def test_manifests_of_any_json(tmp_path: Path, document: Any) -> None:
    store = open_store(tmp_path)
    text = json.dumps(document)
    try:
        digest = sha256(canonical_json(document).encode()).hexdigest()
    except ValueError:  # no canonical form
        digest = sha256(text.encode()).hexdigest()
    store.put_text(f"artifacts/{digest}.json", text)
    for look in (store.manifest, store.fetch, store.verify, lambda digest: store.read(digest, "a")):
        told = refusal((CorruptArtifact, StoreError), partial(look, digest))
        assert not told or digest[:12] in told


@fuzz
@given(data=st.one_of(st.binary(max_size=60), JSON.map(json.dumps).map(str.encode)))
def test_records_and_documents_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    store, key = open_store(tmp_path), "ab" * 32
    store.backend.put(record_path(key), data)
    store.backend.put("runs/a/run.json", data)
    with pytest.raises(CorruptArtifact):
        store.checked_record(key)
    with pytest.raises(CorruptArtifact):
        store.document("runs/a/run.json")
    assert store.stage_record(key) is None
    assert set(find_faults(store)) == {key, "runs/a/run.json"}
    collect_garbage(store)


RECORD = {
    "key": "ab" * 32,
    "stage": "sft",
    "config": {"steps": 3},
    "code": "c0de",
    "libraries": {"torch": "2"},
    "inputs": {"one": "cd" * 32, "many": ["cd" * 32]},
    "outputs": {"tuned": "cd" * 32},
    "result": {"loss": 0.5},
    "seconds": 1.0,
}


@fuzz
@given(fields=st.one_of(st.dictionaries(st.text(max_size=6), JSON, max_size=4), mutations(RECORD)))
def test_sealed_records_of_any_contents(tmp_path: Path, fields: Any) -> None:
    """By somebody who can seal."""
    store, key = open_store(tmp_path), "ab" * 32
    store.put_document(record_path(key), fields)
    assert store.stage_record(key) is None
    assert set(find_faults(store)) == {key}
    collect_garbage(store)


@fuzz
@given(value=st.dictionaries(st.text(max_size=6).filter(lambda name: name != "sha256"), JSON, max_size=4))
def test_a_seal_holds_at_its_place_alone(value: dict[str, Any]) -> None:
    data = seal("runs/a/run.json", value)
    assert json.dumps(unseal("runs/a/run.json", data)) == json.dumps(json.loads(json.dumps(value, sort_keys=True)))
    with pytest.raises(ValueError, match="do not match their digest"):
        unseal("runs/b/run.json", data)


def test_documents_that_would_take_all_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, key = open_store(tmp_path), "ab" * 32
    monkeypatch.setattr(object_store, "MAX_DOCUMENT_BYTES", 4 << 20)
    for path in (record_path(key), f"artifacts/{key}.json", "runs/a/run.json"):
        store.backend.put(path, b"")
        os.truncate(tmp_path / path, 1 << 32)  # takes no room on the disk

    def look() -> None:
        assert store.stage_record(key) is None
        for read in (lambda: store.manifest(key), lambda: store.document("runs/a/run.json")):
            with pytest.raises(CorruptArtifact):
                read()

    assert peak_bytes(look) < 16 << 20
    for path in (record_path(key), "runs/a/run.json"):
        store.backend.put(path, DEEP)
    assert set(find_faults(store)) == {key, "runs/a/run.json"}


# Code that could be made to run, or to write anywhere

FORBIDDEN = {"tarfile", "zipfile", "pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}


def test_our_code_opens_no_archive_and_no_pickle() -> None:
    found = []
    for package in (components, pipelines):
        for path in Path(package.__path__[0]).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                called = f"{ast.unparse(node.func)}" if isinstance(node, ast.Call) else ""
                if FORBIDDEN & {name.partition(".")[0] for name in names} or called in (
                    "torch.load",
                    "shutil.unpack_archive",
                ):
                    found.append(f"{path}: {called or names}")
    assert found == []


def test_an_archive_among_own_files_is_not_unpacked(tmp_path: Path) -> None:
    import zipfile

    (tmp_path / "corpus").mkdir()
    with zipfile.ZipFile(tmp_path / "corpus" / "texts.zip", "w") as archive:
        archive.writestr("inside.txt", "words " * random.Random(0).randrange(50, 60))
    with pytest.raises(DataError):
        corpus_rows(tmp_path / "corpus", skip_bad=False)
