"""A corpus is encoded once, in parallel or not, and never for a tokenizer that reads it in another way."""

import contextlib
import itertools
import json
import random
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from components.core.text.corpus import encoding, parallel
from components.core.text.corpus.encoding import TOKENS, encode_corpus, encode_file, load_corpus
from components.core.text.corpus.parallel import map_rows
from components.core.text.corpus.token_file import TokenFile
from components.core.text.packing import corpus_stream
from components.core.text.tokenizer import train_tokenizer
from tests.components.conftest import SUMS, write_rows

ROWS: list[dict[str, Any]] = [
    *({"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a, b in SUMS),
    *({"text": f"{a} and {b} are\n{a + b}\u2028 — so it is"} for a, b in SUMS),
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "validation.jsonl", ROWS[::7])
    return tmp_path


def contents(documents: Any) -> list[tuple[list[int], list[bool]]]:
    return [(list(map(int, one.token_ids)), list(map(bool, one.counts))) for one in documents]


def test_documents_have_the_tokens_of_the_library_and_an_end(corpus: Path, tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    found = contents(load_corpus(corpus, tokenizer_folder, "train"))
    for row, (ids, counts) in zip(ROWS, found, strict=True):
        prompt = tokenizer.encode(row.get("prompt", ""), add_special_tokens=False).ids
        text = tokenizer.encode(row.get("completion", row.get("text")), add_special_tokens=False).ids
        assert ids == [*prompt, *text, end]
        assert counts == [False] * len(prompt) + [True] * (len(text) + 1)


def test_token_files_are_used_where_the_tokenizer_is_the_same_and_not_else(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = {split: contents(load_corpus(corpus, tokenizer_folder, split)) for split in ("train", "validation")}
    tokens = encode_corpus(corpus, tokenizer_folder, 1)
    assert tokens == {split: sum(len(ids) for ids, _ in found) for split, found in fresh.items()}

    other = tmp_path / "other"
    train_tokenizer([row["text"] for row in ROWS if "text" in row], 320, other)
    assert contents(load_corpus(corpus, other, "train")) != fresh["train"]

    monkeypatch.setattr(encoding, "encode_file", None)
    assert {split: contents(load_corpus(corpus, tokenizer_folder, split)) for split in fresh} == fresh
    with pytest.raises(TypeError):  # encoded anew
        load_corpus(corpus, other, "train")


def test_no_document_is_truncated_whatever_the_file_of_the_tokenizer_says(corpus: Path, tokenizer_folder: Path) -> None:
    cut = corpus / "cut"
    cut.mkdir()
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(cut / "tokenizer.json"))
    (cut / "tokenizer_config.json").write_bytes((tokenizer_folder / "tokenizer_config.json").read_bytes())
    assert contents(load_corpus(corpus, cut, "train")) == contents(load_corpus(corpus, tokenizer_folder, "train"))


def test_several_processes_write_the_same_bytes_and_report_how_far_they_are(
    corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "MIN_PARALLEL_BYTES", 0)
    monkeypatch.setattr(parallel, "CHUNK_BYTES", 500)
    before = encoders()
    done: dict[str, list[tuple[int, int]]] = {"one": [], "two": []}
    rows = corpus / "train.jsonl"
    counts = [
        encode_file(rows, corpus / name, tokenizer_folder, processes, lambda *at: done[name].append(at))  # noqa: B023
        for name, processes in (("one", 1), ("two", 2))
    ]
    assert counts[0] == counts[1]
    assert counts[0]["documents"] == len(ROWS)
    for ending in ("bin", "idx"):
        assert (corpus / f"one.{ending}").read_bytes() == (corpus / f"two.{ending}").read_bytes()
    total = rows.stat().st_size
    assert len(done["one"]) > 10
    assert done["one"] == done["two"]
    assert done["one"][-1] == (total, total)
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(done["one"]))
    assert encoders() <= before


def encoders() -> set[int]:
    """Processes of this one that `multiprocessing` has started; tests of other files may have some."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


class Texts:
    """Texts of rows."""

    def __call__(self, rows: list[dict[str, Any]]) -> list[str]:
        return [row["text"] for row in rows]


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_every_row_comes_once_and_in_order_however_long_the_chunks_are(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "CHUNK_BYTES", chunk)
    rng = random.Random(0)
    texts = ["\u2028x" * rng.randrange(9) for _ in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    assert [text for part in map_rows(tmp_path / "rows.jsonl", Texts, 1) for text in part] == texts


def test_a_blend_takes_rows_of_each_corpus_by_weight(corpus: Path, tokenizer_folder: Path) -> None:
    plain = corpus_stream(corpus, tokenizer_folder, "train", seq_len=32, seed=1)
    (corpus / "blend.json").write_text(json.dumps({"weights": [3, 1], "documents": {"train": [100, 100]}}))
    blended = corpus_stream(corpus, tokenizer_folder, "train", seq_len=32, seed=1, folder=corpus / "rows")
    newline = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).encode("\n").ids[0]
    of_texts = [bool((row == newline).any()) for row in blended.batch(0, 40).input_ids_BT]

    assert sum(of_texts) == 10
    assert all(abs(sum(of_texts[:n]) - n / 4) < 1 for n in range(41))
    assert 0 < blended.num_rows < plain.num_rows
    assert len({tuple(row.tolist()) for row in blended.batch(0, blended.num_rows).input_ids_BT}) == blended.num_rows


def test_the_record_says_what_the_files_have(corpus: Path, tokenizer_folder: Path) -> None:
    encode_corpus(corpus, tokenizer_folder, 1)
    record = json.loads((corpus / TOKENS).read_text())
    documents = TokenFile(corpus / "validation")
    assert record["splits"]["validation"] == {
        "documents": len(documents),
        "tokens": int(documents.lengths.sum()),
        "largest_id": max(int(max(one.token_ids)) for one in documents),
    }
