"""A stage on a user's own files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from components.core.base.errors import InputError, RecipeError
from components.core.runtime.entry import artifact_digest, main, run_alone
from components.core.store.store import Store, open_store
from tests.components.core.fake_stage import STAGE, numbers_folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    return numbers_folder(tmp_path / "numbers", 1, 2, 3)


def test_outputs_are_written_where_they_are_wanted(store, numbers, tmp_path):
    target = tmp_path / "made" / "total"
    record = run_alone(STAGE, {"factor": 2}, {"numbers": [str(numbers)]}, {"total": str(target)}, store)

    assert json.loads((target / "total.json").read_text()) == 12
    assert (target / "total.json").stat().st_mode & 0o200  # a user's own file, not the store's
    assert record.outputs["total"] == store.put_folder(target, "table").digest


def test_a_second_call_computes_nothing_whatever_its_placement(store, numbers):
    first = run_alone(STAGE, {}, {"numbers": [str(numbers)]}, {}, store)
    again = run_alone(STAGE, {"placement": {"threads": 7}}, {"numbers": [str(numbers)]}, {}, store)

    assert again == first  # with the seconds that the first one took


def test_inputs_come_as_folder_file_digest_or_from_another_store(store, numbers, tmp_path):
    other = open_store(tmp_path / "other")
    digest = other.put_folder(numbers, "data").digest

    assert artifact_digest(digest, "data", store) == digest
    for value in (str(numbers), str(numbers / "numbers.json"), f"{other.uri}#{digest}"):
        assert artifact_digest(value, "data", store) == digest
    more = [str(numbers), digest]
    assert run_alone(STAGE, {}, {"numbers": [digest], "more": more}, {}, store).result == {"total": 18}


def test_wrong_names_and_places_are_refused_before_anything_runs(store, numbers, tmp_path):
    given = {"numbers": [str(numbers)]}
    with pytest.raises(InputError, match="no output 'totals'\n  hint: it makes total, nothing"):
        run_alone(STAGE, {}, given, {"totals": "x"}, store)
    with pytest.raises(InputError, match="is there already"):
        run_alone(STAGE, {}, given, {"total": str(numbers)}, store)
    with pytest.raises(InputError, match="no input 'n'"):
        run_alone(STAGE, {}, {"n": [str(numbers)]}, {}, store)
    with pytest.raises(InputError, match="is not there"):
        run_alone(STAGE, {}, {"numbers": [str(tmp_path / "absent")]}, {}, store)
    with pytest.raises(RecipeError, match="did you mean 'factor'"):
        run_alone(STAGE, {"factr": 2}, given, {}, store)
    with pytest.raises(RecipeError, match=r"placement\.threads='many'"):
        run_alone(STAGE, {"placement": {"threads": "many"}}, given, {}, store)
    assert not (tmp_path / "store").exists()


def test_the_command_line_says_what_was_made(numbers, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("factor: 5\n")
    arguments = ["--config", str(tmp_path / "config.yaml"), "--input", f"numbers={numbers}"]
    main(STAGE, [*arguments, "--output", f"total={tmp_path / 'total'}", "--store", str(tmp_path / "store")])

    name, digest = capsys.readouterr().out.split()
    assert (name, (tmp_path / "total" / "total.json").read_text()) == ("total", "30")
    open_store(tmp_path / "store").verify(digest)


@pytest.mark.parametrize(
    ("setting", "exit_code", "message"),
    [
        ("fail: data", 2, "DataError: row 3 is no number\n  hint: mend row 3\n"),
        ("fail: bug", 1, "StageFailed: fake stopped: ZeroDivisionError: division by zero\n"),
        ("factor: much", 2, "RecipeError: factor='much': Input should be a valid integer"),
    ],
)
def test_the_command_line_ends_with_the_exit_code_of_the_error(numbers, tmp_path, capsys, setting, exit_code, message):
    (tmp_path / "config.yaml").write_text(setting)
    arguments = ["--config", str(tmp_path / "config.yaml"), "--input", f"numbers={numbers}"]
    with pytest.raises(SystemExit) as ended:
        main(STAGE, [*arguments, "--store", str(tmp_path / "store")])

    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (exit_code, "")
    assert told.err.startswith(message)


@pytest.mark.parametrize("stage", ["data", "search", "distill", "pretrain", "sft", "rl", "eval", "deploy"])
def test_every_container_has_its_entry(stage):
    """Read, not run: starting eight interpreters takes longer than all of this file."""
    text = Path("components", stage, "__main__.py").read_text()
    assert "from components.core.runtime.entry import main" in text
    assert f"components.{stage}" in text


def test_a_container_explains_itself_without_torch():
    code = (
        "import sys; sys.argv[1:] = ['--help']\nimport atexit\natexit.register(lambda: print('torch' in sys.modules))\n"
    )
    code += "import runpy; runpy.run_module('components.sft', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "Teach both modes" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
