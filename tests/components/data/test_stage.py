"""The data stage as a whole: the made world, and a user's own files."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from components.core.base.errors import DataError
from components.core.runtime.context import StageContext
from components.core.store.manifest import describe
from components.core.text.chat import encode_chats
from components.core.text.toggle import has_toggle
from components.data.config import STAGE, ArithmeticConfig, DataConfig
from components.data.stage import own_tables, run
from components.eval.answers import load_problems
from tests.components.conftest import Recorder, write_rows
from tests.components.core.tiny_models import TOKENS
from tests.components.core.tiny_models import tokenizer as plain_tokenizer

TINY = DataConfig(
    arithmetic=ArithmeticConfig(num_train=300, num_chats=50, num_validation=20, num_test=20), seed=3, nemo_packed=128
)
REASONING = DataConfig.model_validate({"reasoning_gym": {"chain_sum": 40, "leg_counting": 20}})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return outputs(tmp_path / "out")


def outputs(folder: Path) -> Path:
    """An empty folder for each output."""
    for name in STAGE.outputs:
        (folder / name).mkdir(parents=True)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def own_files(folder: Path, *, twice: int = 1) -> dict[str, Path]:
    """A corpus, chats in both modes, and problems of three levels, all about the same sums."""
    asked = [(f"{a}+{b}=", str(a + b), a % 3) for a in range(9) for b in range(9)]
    chats = [{"input": q, "output": reply} for q, a, _ in asked for reply in (a, f"<think>{q}{a}</think>{a}")]
    for name in ("corpus", "chats", "problems"):
        (folder / name).mkdir()
    (folder / "corpus" / "a.txt").write_text("sums of digits, told as text")
    write_rows(folder / "corpus" / "b.jsonl", [{"prompt": q, "completion": a} for q, a, _ in asked] * twice)
    write_rows(folder / "chats" / "c.jsonl", chats * twice)
    write_rows(
        folder / "problems" / "p.jsonl", [{"question": q, "answer": a, "level": level} for q, a, level in asked] * twice
    )
    return {f"own_{name}": folder / name for name in ("corpus", "chats", "problems")}


def test_the_made_world_as_files_that_the_next_stages_read(recorded_context: StageContext, out: Path) -> None:
    result: Any = run(TINY, context=recorded_context, out=out)
    assert result["skipped"] == 0
    assert result["rows"] == {
        "corpus/train": 300,
        "corpus/validation": 20,
        "chats/train": 100,
        "chats/validation": 40,
        "problems/train": 300,
        "problems/validation": 20,
        "problems/test-standard": 20,
        "problems/test-hard": 20,
    }
    for name, count in result["rows"].items():
        assert len(read(out / f"{name}.jsonl")) == count
    assert has_toggle(out / "tokenizer")
    core = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    assert core.get_vocab_size() == result["vocab_size"] <= TINY.vocab_size
    assert len(encode_chats(read(out / "chats" / "train.jsonl"), out / "tokenizer")) == 100
    asked = load_problems(out / "problems", 5)
    assert [problem.split for problem in asked] == ["standard"] * 5 + ["hard"] * 5
    assert (out / "chats" / "nemo-packed.parquet").is_file()


@pytest.mark.parametrize("config", [TINY, REASONING], ids=["arithmetic", "reasoning-gym"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    config: DataConfig, recorded_context: StageContext, tmp_path: Path
) -> None:
    if config.reasoning_gym:
        pytest.importorskip("reasoning_gym")
    made = {}
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        folder = outputs(tmp_path / name)
        run(config.model_copy(update={"seed": seed}), context=recorded_context, out=folder)
        made[name] = describe(folder, "data").digest
    assert made["one"] == made["again"] != made["other"]


def test_own_files_as_the_next_stages_read_them(
    recorded_context: StageContext, recorder: Recorder, out: Path, tmp_path: Path
) -> None:
    plain_tokenizer().save_pretrained(tmp_path / "parent")
    result: Any = run(
        DataConfig(test_fraction=0.2),
        context=recorded_context,
        out=out,
        parent=tmp_path / "parent",
        **own_files(tmp_path),
    )
    assert result["skipped"] == 0
    (note,) = recorder.notes
    assert note.startswith("Tessera's chat template stands in place of the parent's, which cannot carry the switch: it")
    assert has_toggle(out / "tokenizer")
    counts = result["rows"]
    assert counts["corpus/train"] + counts["corpus/validation"] == 82
    assert counts["chats/train"] + counts["chats/validation"] == 162
    assert sum(count for name, count in counts.items() if name.startswith("problems/")) == 81
    assert all(counts.values())
    assert {row["level"] for row in read(out / "problems" / "test-hard.jsonl")} == {2}
    assert {row["level"] for row in read(out / "problems" / "test-standard.jsonl")} == {0, 1}
    assert {problem.split for problem in load_problems(out / "problems", 99)} == {"standard", "hard"}


@pytest.mark.parametrize("twice", [1, 2])
def test_what_is_tested_is_trained_on_nowhere_and_both_modes_stay_together(
    recorded_context: StageContext, out: Path, tmp_path: Path, twice: int
) -> None:
    run(DataConfig(test_fraction=0.2), context=recorded_context, out=out, **own_files(tmp_path, twice=twice))
    tested = {row["question"] for path in (out / "problems").glob("[tv]*.jsonl") for row in read(path)} - {
        row["question"] for row in read(out / "problems" / "train.jsonl")
    }
    assert 81 * 0.15 < len(tested) < 81 * 0.35
    modes: dict[str, dict[str, set[str]]] = {"train": {}, "validation": {}}
    for split, told in modes.items():
        for row in read(out / "chats" / f"{split}.jsonl"):
            told.setdefault(row["messages"][1]["content"], set()).add(row["reasoning"])
    assert not modes["train"].keys() & (tested | modes["validation"].keys())
    assert all(found == {"on", "off"} for told in modes.values() for found in told.values())
    assert tested <= modes["validation"].keys()
    assert not {row.get("prompt") for row in read(out / "corpus" / "train.jsonl")} & tested


def test_chats_alone_leave_the_rest_empty_and_problems_without_levels_the_hard_test(
    recorded_context: StageContext, tmp_path: Path
) -> None:
    own = own_files(tmp_path)
    write_rows(own["own_problems"] / "p.jsonl", [{"question": str(n), "answer": n} for n in range(50)])
    chats, problems = outputs(tmp_path / "a"), outputs(tmp_path / "b")
    run(DataConfig(), context=recorded_context, out=chats, own_chats=own["own_chats"])
    run(DataConfig(), context=recorded_context, out=problems, own_problems=own["own_problems"])
    assert (chats / "corpus" / "train.jsonl").read_text() == (chats / "problems" / "train.jsonl").read_text() == ""
    assert read(problems / "problems" / "test-hard.jsonl") == []
    assert {problem.split for problem in load_problems(problems / "problems", 99)} == {"standard"}


def test_bad_lines_and_files_are_counted_over_all_inputs(
    recorded_context: StageContext, recorder: Recorder, out: Path, tmp_path: Path
) -> None:
    own = own_files(tmp_path)
    (own["own_corpus"] / "picture").write_bytes(b"\0\xff")
    with (own["own_chats"] / "c.jsonl").open("a") as stream:
        stream.write('{"input": "a"}\n\n')
    with pytest.raises(DataError, match=r"2 malformed lines: c\.jsonl line 163: no 'output'; c\.jsonl line 164: empty"):
        run(DataConfig(), context=recorded_context, out=out, **own)
    assert [path for path in out.rglob("*") if path.is_file()] == []
    result = run(DataConfig(skip_bad=True), context=recorded_context, out=out, **own)
    assert result["skipped"] == 3
    assert [note.split(":")[0] for note in recorder.notes] == ["left out"] * 3


def test_one_row_of_each_is_for_training(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"input": "a", "output": "b", "question": "a", "answer": "b", "text": "a"}])
    tables, _ = own_tables(DataConfig(), tmp_path, tmp_path, [])
    assert {name for name, rows in tables.items() if rows} == {("chats", "train"), ("problems", "train")}


def test_nemo_packs_say_what_they_leave_out_and_need_a_chat(
    recorded_context: StageContext, recorder: Recorder, out: Path, tmp_path: Path
) -> None:
    own = own_files(tmp_path)
    long = {"input": "1" * 600, "output": "b"}
    write_rows(own["own_chats"] / "c.jsonl", [{"input": str(n), "output": "b"} for n in range(20)] + [long] * 2)
    run(
        DataConfig(nemo_packed=100, validation_fraction=0.01),
        context=recorded_context,
        out=out,
        own_chats=own["own_chats"],
    )
    assert recorder.notes == ["2 chats are longer than nemo_packed=100 and were left out of NeMo's packs"]
    with pytest.raises(DataError, match="none of 0 chats fits into nemo_packed=100 tokens"):
        run(DataConfig(nemo_packed=100), context=recorded_context, out=out, own_problems=own["own_problems"])


def test_a_text_that_the_parent_has_no_row_for_is_refused_before_the_search(
    recorded_context: StageContext, out: Path, tmp_path: Path
) -> None:
    """Chats may have such tokens: fine-tuning adds rows for them."""
    own = {name: folder for name, folder in own_files(tmp_path).items() if name != "own_problems"}
    parent = tmp_path / "parent"
    plain_tokenizer().save_pretrained(parent)
    rows = TOKENS.index("t")
    (parent / "config.json").write_text(json.dumps({"vocab_size": rows}))
    message = (
        f"text .* of corpus/train has the token 'u' with id {rows + 1}, and the embedding of parent has {rows} rows"
    )
    with pytest.raises(DataError, match=message):
        run(DataConfig(), context=recorded_context, out=out, parent=parent, **own)
    (own["own_corpus"] / "a.txt").write_text("a hill")
    write_rows(own["own_chats"] / "d.jsonl", [{"input": "two", "output": "too"}] * 20)
    run(DataConfig(), context=recorded_context, out=outputs(tmp_path / "more"), parent=parent, **own)
