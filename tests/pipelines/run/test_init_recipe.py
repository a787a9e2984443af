"""`tessera init`: from a model folder and files to a recipe that passes the check, each value with its reason."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.core.base.errors import InputError
from components.core.model.accelerators import DEVICES
from components.core.store.store import open_store
from pipelines.cli import run_command
from pipelines.recipe.checks import find_faults
from pipelines.recipe.schema import Recipe, load_recipe
from pipelines.run.init_recipe import init_recipe
from pipelines.run.plan import make_plan
from pipelines.sizing.machine import Machine
from tests.components.core import tiny_models

HERE = Machine(DEVICES["CPU"], None, 0, 2, 16 << 30)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tiny_models.write(tiny_models.llama(0), tmp_path / "model")


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, list[Path]]:
    """Files of a user, beside the model."""
    texts = [{"text": f"{word} " * 30} for word in WORDS * 10]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"how long is {word}"},
                {"role": "assistant", "content": f"{thought}{len(word)}"},
            ]
        }
        for word in WORDS
        for thought in ("", f"<think>{' '.join(word)}</think>")
    ]
    problems = [{"question": f"how long is {word}", "answer": len(word)} for word in WORDS]
    return {
        "corpus": [write_rows(tmp_path / "text.jsonl", texts)],
        "chats": [write_rows(tmp_path / "chats.jsonl", chats)],
        "problems": [write_rows(tmp_path / "problems.jsonl", problems)],
    }


def written(parent: Path, sources: dict[str, list[Path]], out: Path, **limits: Any) -> Recipe:
    init_recipe(parent, sources, limits, HERE, out)
    return load_recipe(out)


def test_the_recipe_passes_the_check_and_names_the_files_beside_it(
    parent: Path, sources: dict[str, list[Path]], tmp_path: Path
) -> None:
    recipe = written(parent, sources, tmp_path / "mine.yaml", latency_ms="60%")
    assert list(find_faults(recipe)) == []
    assert recipe.name == "mine"
    text = (tmp_path / "mine.yaml").read_text()
    assert 'parent: "./model"' in text
    assert recipe.search is not None
    assert recipe.search.limits.latency_ms == "60%"
    assert recipe.deploy is not None
    assert recipe.deploy.questions[0] in [f"how long is {word}" for word in WORDS]
    assert recipe.sft is not None
    assert recipe.sft.learning_rate == pytest.approx(1.76e-3, rel=0.05)


def test_each_value_has_a_comment_above_it(parent: Path, sources: dict[str, list[Path]], tmp_path: Path) -> None:
    written(parent, sources, tmp_path / "mine.yaml")
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    valued = [number for number, line in enumerate(lines) if ": " in line and not line.lstrip().startswith("#")]
    assert len(valued) > 40
    assert [lines[number] for number in valued if not lines[number - 1].lstrip().startswith("#")] == []
    assert all(len(line) <= 120 for line in lines if "./" not in line)


def test_the_recipe_tells_what_was_measured_and_that_the_machine_was_busy(
    parent: Path, sources: dict[str, list[Path]], tmp_path: Path
) -> None:
    init_recipe(parent, sources, {}, HERE, tmp_path / "idle.yaml")
    init_recipe(parent, sources, {}, replace(HERE, load=5.5), tmp_path / "busy.yaml")
    idle, busy = ((tmp_path / f"{name}.yaml").read_text().split("\nname:")[0] for name in ("idle", "busy"))
    comment = " ".join(line.removeprefix("# ") for line in busy.splitlines())
    assert "GFLOPS in float32 and" in comment
    assert "GB/s of memory (one thread of an AMD EPYC" in comment
    assert "Warning: the speed was measured on a busy machine, with 5.5 processes" in comment
    assert "busy" not in idle
    assert load_recipe(tmp_path / "busy.yaml").search == load_recipe(tmp_path / "idle.yaml").search


def test_only_text_leaves_out_what_learns_from_chats(
    parent: Path, sources: dict[str, list[Path]], tmp_path: Path
) -> None:
    recipe = written(parent, {"corpus": sources["corpus"]}, tmp_path / "mine.yaml")
    assert (recipe.sft, recipe.rl, recipe.deploy) == (None, None, None)
    assert recipe.search is not None
    assert recipe.search.limits.latency_ms == "70%"


def test_only_chats_tune_the_parent_itself(parent: Path, sources: dict[str, list[Path]], tmp_path: Path) -> None:
    recipe = written(parent, {"chats": sources["chats"]}, tmp_path / "mine.yaml")
    assert (recipe.search, recipe.distill, recipe.pretrain, recipe.eval) == (None, None, None, None)
    assert recipe.sft is not None


def test_the_plan_of_it_tells_its_learning_rates_and_what_it_takes(
    parent: Path, sources: dict[str, list[Path]], tmp_path: Path
) -> None:
    recipe = written(parent, sources, tmp_path / "mine.yaml")
    plan = make_plan(recipe, open_store(str(tmp_path / "store")), lambda: HERE)
    assert plan.prediction is not None
    keys = [setting.key for setting in plan.prediction.chosen]
    assert keys[:4] == [f"{stage}.learning_rate" for stage in ("distill", "pretrain", "sft", "rl")]
    assert not any("not set" in note for note in plan.notes)
    assert plan.prediction.misfits == []
    assert plan.prediction.work["sft"].flops > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "there is no data to train on"),
        (("problems",), "problems are for a model that has learned to think from chats"),
    ],
)
def test_data_that_no_recipe_can_be_made_of(
    given: tuple[str, ...], message: str, parent: Path, sources: dict[str, list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        init_recipe(parent, {name: sources[name] for name in given}, {}, HERE, tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limits", "latency=70%"], "did you mean 'latency_ms'"),
        (["--limits", "latency_ms"], "is not of the form NAME=VALUE"),
        (["--chats", "absent.jsonl"], "sft.data: no such file or folder: absent.jsonl"),
        (["--out", "there.yaml"], "there.yaml is there already"),
    ],
)
def test_wrong_use_writes_nothing(
    arguments: list[str],
    message: str,
    parent: Path,
    sources: dict[str, list[Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.sizing.machine.this_machine", lambda: HERE)
    (tmp_path / "there.yaml").write_text("mine\n")
    assert run_command(["init", str(parent), "--corpus", str(sources["corpus"][0]), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()
    assert (tmp_path / "there.yaml").read_text() == "mine\n"


def test_the_command_measures_this_machine_and_says_what_to_do_next(
    parent: Path,
    sources: dict[str, list[Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [text for name, (path,) in sources.items() for text in (f"--{name}", str(path))]
    assert run_command(["init", str(parent), *paths, "--limits", "latency_ms=70%", "--out", "mine.yaml"]) == 0
    assert "tessera plan mine.yaml" in capsys.readouterr().out
    assert run_command(["plan", "mine.yaml", "--device", "H100:8"]) == 0
    shown = capsys.readouterr().out
    assert "predicted for 8 x H100" in shown
    assert "nothing is wrong" in shown
