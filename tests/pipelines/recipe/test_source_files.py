"""The user's own files become artifacts, known by their contents alone."""

from pathlib import Path

import pytest

from components.core.base.errors import InputError
from components.core.store.store import Store, open_store
from pipelines.recipe.source_files import SourceSize, files_of, quick_size
from pipelines.records.runs import artifact
from pipelines.run.ingest import ingest, source_digest
from tests.pipelines.made_up_run import make_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def write(path: Path, text: str = "text\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_equal_names_from_several_folders_stay_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a" / "x.txt"), write(tmp_path / "b" / "x.txt")]
    assert [name for name, _ in files_of("own_corpus", paths, "data")] == ["000-x.txt", "001-x.txt"]


def test_hidden_and_binary_files_of_a_folder_are_left_behind(tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "deep" / "a.py")
    write(tmp_path / "corpus" / ".git" / "config")
    (tmp_path / "corpus" / "a.pyc").write_bytes(b"\0\1\2")
    assert [name for name, _ in files_of("own_corpus", [str(tmp_path / "corpus")], "data")] == ["deep/a.py"]


def test_a_table_is_known_by_the_name_of_its_input(tmp_path: Path) -> None:
    path = write(tmp_path / "measured-yesterday.json", "{}")
    assert [name for name, _ in files_of("own_costs", [path], "table")] == ["costs.json"]


def test_the_digest_told_beforehand_is_that_of_the_stored_artifact(store: Store, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b")]
    before = source_digest(store, "own_corpus", paths, "data")
    assert ingest(store, "own_corpus", paths, "data") == before


def test_an_artifact_is_named_by_digest_and_must_be_of_the_kind(store: Store, tmp_path: Path) -> None:
    digest = ingest(store, "own_corpus", [write(tmp_path / "a.txt")], "data")
    assert ingest(store, "corpus", [digest], "data") == digest
    with pytest.raises(InputError, match="is a data, not a model"):
        ingest(store, "parent", [digest], "model")


def test_libraries_lie_beside_each_other_whole(store: Store, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        write(folder / "library.json", folder.name)
        (folder / "layer-0").mkdir()
        (folder / "layer-0" / "ffn-8.safetensors").write_bytes(b"\0\1" + folder.name.encode())
    names = ["layer-0/ffn-8.safetensors", "library.json"]
    assert [name for name, _ in files_of("own_libraries", [str(folders[0])], "library")] == names
    paths = [str(folders[0]), ingest(store, "own_libraries", [str(folders[1])], "library")]
    digest = ingest(store, "own_libraries", paths, "library")
    both = [f"{index}/{name}" for index in ("000", "001") for name in names]
    assert sorted(store.manifest(digest).files) == both
    assert store.read(digest, both[2]) == b"\0\1second"
    stored = [ingest(store, "own_libraries", [paths[0]], "library"), paths[1]]
    assert source_digest(store, "own_libraries", stored, "library") == digest
    assert ingest(store, "own_libraries", stored, "library") == digest


def test_the_library_of_a_run_is_all_its_shards(store: Store) -> None:
    make_run(store)
    shards = [artifact(store, "demo-1", f"library-{index}") for index in range(2)]
    digest = ingest(store, "own_libraries", ["run://latest/library"], "library")
    assert digest == ingest(store, "own_libraries", shards, "library")
    assert source_digest(store, "own_libraries", ["run://demo-1/library"], "library") == digest
    with pytest.raises(InputError, match="no run 'demo-2'"):
        ingest(store, "own_libraries", ["run://demo-2/library"], "library")


def test_an_artifact_of_another_store_is_copied_over(store: Store, tmp_path: Path) -> None:
    other = open_store(str(tmp_path / "other"))
    digest = ingest(other, "own_corpus", [write(tmp_path / "a.txt")], "data")
    assert ingest(store, "corpus", [f"{other.uri}#{digest}"], "data") == digest
    store.verify(digest)


def test_the_bytes_of_usual_rows_are_those_of_99_in_a_hundred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("".join("x" * n + "\n" for n in range(1, 101)))
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    rows = str(tmp_path / "a.jsonl")
    assert quick_size([rows]) == SourceSize(num_bytes=5150, row_bytes=99)
    assert quick_size([rows, str(tmp_path / "b.jsonl.gz")]) is None
    assert quick_size([str(tmp_path / "absent.jsonl")]) is None
    monkeypatch.setattr("pipelines.recipe.source_files.QUICK_BYTES", 1000)
    assert quick_size([rows]) == SourceSize(num_bytes=5150, row_bytes=43)  # what the first 1,000 bytes show


def test_a_text_file_is_one_row_and_beside_files_of_rows_it_does_not_count(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("x" * 10 * (number + 1))
    (tmp_path / "picture.txt").write_bytes(b"\0" * 99)
    (tmp_path / ".hidden").write_text("x" * 1000)
    assert quick_size([str(tmp_path)]) == SourceSize(num_bytes=60, row_bytes=30)
    (tmp_path / "rows.ndjson").write_text("x\n\n")
    assert quick_size([str(tmp_path)]) == SourceSize(num_bytes=3, row_bytes=1)
