"""A user's corpus by split: no near duplicate on both sides, blended by weight, in one pass of little memory."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from components.core.base.errors import DataError
from components.core.runtime.context import StageContext
from components.core.text.row_files import Row
from components.data.corpus import write_corpus
from components.data.own_files import CorpusReader
from components.data.splits import normalised, question_digest
from tests.components.conftest import write_rows


def written(
    folder: Path, context: StageContext, *, weights: Sequence[float] = (), held_out: Sequence[str] = ()
) -> tuple[list[Row], list[Row], Path]:
    out = folder.parent / "out"
    out.mkdir()
    reader = CorpusReader(folder, skip_bad=False)
    counts = write_corpus(reader, out, weights, 0.2, set(map(question_digest, held_out)), context)
    files = [(out / f"{split}.jsonl").read_text() for split in ("train", "validation")]
    splits = [[json.loads(line) for line in text.splitlines()] for text in files]
    assert counts == {"train": len(splits[0]), "validation": len(splits[1])}
    assert list(context.scratch.iterdir()) == []
    return splits[0], splits[1], out


def test_near_duplicates_are_on_one_side(tmp_path: Path, recorded_context: StageContext) -> None:
    own = tmp_path / "own"
    own.mkdir()
    forms = ("Text number {}.", "text  number {}", "TEXT NUMBER {}!", "\u201ctext number {}\u201d")
    write_rows(own / "a.jsonl", [{"text": form.format(number)} for form in forms for number in range(100)])
    train, validation, _ = written(own, recorded_context)
    sides = [{normalised(str(row["text"])) for row in rows} for rows in (train, validation)]

    assert not sides[0] & sides[1]
    assert len(train) + len(validation) == 400
    assert 5 <= len(sides[1]) <= 40
    assert len(validation) == 4 * len(sides[1])


def test_a_prompt_that_is_a_held_out_question_is_not_trained_on(tmp_path: Path, recorded_context: StageContext) -> None:
    own = tmp_path / "own"
    own.mkdir()
    write_rows(own / "a.jsonl", [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(50)])
    train, validation, _ = written(own, recorded_context, held_out=[f"what is {n}" for n in range(0, 50, 2)])
    assert {int(str(row["completion"])) % 2 for row in train} == {1}
    assert {int(str(row["completion"])) for row in validation} > set(range(0, 50, 2))


def test_a_single_text_is_trained_on(tmp_path: Path, recorded_context: StageContext) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.txt").write_text("one")
    assert written(own, recorded_context)[:2] == ([{"text": "one"}], [])


def test_corpora_with_weights_follow_one_another_and_are_counted(
    tmp_path: Path, recorded_context: StageContext
) -> None:
    own = tmp_path / "own"
    (own / "000-books").mkdir(parents=True)
    write_rows(own / "000-books" / "a.jsonl", [{"text": f"book {n}"} for n in range(60)])
    write_rows(own / "001-code.jsonl", [{"text": f"code {n}"} for n in range(40)])
    train, validation, out = written(own, recorded_context, weights=(0.9, 0.1))
    blend = json.loads((out / "blend.json").read_text())

    assert blend["weights"] == [0.9, 0.1]
    for split, rows in (("train", train), ("validation", validation)):
        books, codes = blend["documents"][split]
        assert [str(row["text"])[:4] for row in rows] == ["book"] * books + ["code"] * codes
    assert [sum(counts) for counts in zip(*blend["documents"].values(), strict=True)] == [60, 40]


def test_weights_for_more_or_fewer_corpora_are_refused(tmp_path: Path, recorded_context: StageContext) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in ("000-a.jsonl", "001-b.jsonl"):
        write_rows(own / name, [{"text": name}])
    with pytest.raises(DataError, match="3 weights, and the recipe names 2 corpora"):
        written(own, recorded_context, weights=(1, 1, 1))


def test_a_pointer_of_git_lfs_is_named_with_the_way_out(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.example/spec/v1\noid sha256:0\nsize 12\n"
    for name in ("data/a.parquet", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(pointer)
    with pytest.raises(DataError, match=r"a\.parquet: a pointer of Git LFS, not the data: run `git lfs pull`"):
        list(CorpusReader(tmp_path, skip_bad=False).rows())
    (tmp_path / "data" / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"b\.txt: a pointer of Git LFS"):
        list(CorpusReader(tmp_path, skip_bad=False).rows())


def test_hidden_folders_of_a_clone_are_no_text(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs")
    (tmp_path / "a.txt").write_text("text")
    assert list(CorpusReader(tmp_path, skip_bad=False).rows()) == [{"text": "text"}]
