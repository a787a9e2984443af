"""The command line: messages, exit codes, and the same cache for a stage alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.core.base.errors import RunStopped
from pipelines.cli import app, run_command

RUNNER = CliRunner()
TINY_DATA = "arithmetic: {num_train: 60, num_chats: 20, num_validation: 10, num_test: 10}\n"


def test_help_lists_the_commands_and_loads_no_large_library() -> None:
    result = RUNNER.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("init", "run", "plan", "compile", "stage", "report", "lineage", "chat", "serve", "export", "store"):
        assert command in result.output
    code = "import sys; from pipelines.cli import run_command; run_command(['--help'])"
    code += "; assert not {'torch', 'kfp', 'mlflow', 'pydantic'}.intersection(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


CTRL_C_AT_IMPORT = """
import os, runpy, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == loaded:
            print("Ctrl-C", flush=True)
            os.kill(os.getpid(), signal.SIGINT)

loaded = sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has a command in the background ignore it
sys.meta_path.insert(0, Finder)
runpy.run_module("pipelines", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("loaded", ["typer", "pipelines.commands", "pydantic", "yaml"])
def test_ctrl_c_while_the_command_loads_shows_no_traceback_of_ours(loaded: str, tmp_path: Path) -> None:
    """Ctrl-C comes when one of the imports begins, so no clock decides where."""
    command = [sys.executable, "-c", CTRL_C_AT_IMPORT, loaded, "runs", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "Ctrl-C\n"
    assert "/pipelines/" not in done.stderr
    assert done.returncode == RunStopped.exit_code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "absent.yaml"], "RecipeError: there is no file absent.yaml"),
        (["stage", "dstill"], "no stage 'dstill'\n  hint: did you mean 'distill'?"),
        (["stage", "data", "--input", "own_corpus"], "'own_corpus' is not of the form NAME=PATH_OR_URI"),
        (
            ["stage", "data", "--input", "corpus=x"],
            "stage data has no input 'corpus'\n  hint: did you mean 'own_corpus'?",
        ),
        (["stage", "data", "--output", "tokeniser=x"], "stage data has no output 'tokeniser'"),
        (["stage", "distill", "--skip-bad", "--set", "num_steps=1"], "stage distill reads no rows of yours to skip"),
        (["stage", "data", "--set", "vocab_sise=300"], "unknown key 'vocab_sise'\n  hint: did you mean 'vocab_size'?"),
        (["report", "latest"], "no runs in"),
        (["export", "demo-1", "child", "out"], "no run 'demo-1' in"),
        (["ui"], "no records yet for"),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / ".tessera" / "stages").exists()


def test_a_misspelt_command_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["pln"]) == 2
    assert "plan" in capsys.readouterr().err


def test_debug_shows_where_it_went_wrong(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="there is no file"):
        run_command(["plan", str(tmp_path / "absent.yaml")], debug=True)


def test_a_stage_alone_writes_plain_files_and_is_cached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(TINY_DATA)
    common = ["stage", "data", "--config", str(config), "--set", "seed=1", "--store", str(tmp_path / "store")]
    assert run_command([*common, "--output", f"chats={tmp_path / 'first'}"]) == 0
    first = capsys.readouterr().out
    assert "data: done" in first
    assert run_command([*common, "--output", f"chats={tmp_path / 'second'}"]) == 0
    second = capsys.readouterr().out
    assert "data: cached" in second
    assert first.splitlines()[-4:] == second.splitlines()[-4:]
    assert run_command(["runs", "--json", "--store", str(tmp_path / "store")]) == 0
    assert [run["run"] for run in json.loads(capsys.readouterr().out)] == ["data-1", "data-2"]
    target = str(tmp_path / "third")
    assert run_command(["export", "data-2", "chats", target, "--store", str(tmp_path / "store")]) == 0
    assert (tmp_path / "third" / "train.jsonl").read_bytes() == (tmp_path / "first" / "train.jsonl").read_bytes()
    row = (tmp_path / "second" / "train.jsonl").read_text().splitlines()[0]
    assert json.loads(row)["reasoning"] in ("on", "off")


def test_an_output_folder_in_use_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    arguments = ["stage", "data", "--output", f"chats={tmp_path / 'out'}", "--store", str(tmp_path / "store")]
    assert run_command(arguments) == 2
    assert "is there already and not empty" in capsys.readouterr().err


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"
