"""The command line of one stage, as a container and the local runner start it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from components.core.base.errors import DataError, ProcessKilled, StageFailed, StoreError
from components.core.runtime.events import EventFile
from components.core.runtime.runner import events_path
from components.core.runtime.stage_command import command_line, main
from components.core.store.store import StageRecord, Store, open_store
from tests.components.core import fake_stage
from tests.components.core.fake_stage import numbers_folder
from tests.waiting import wait_until

DECLARATION = "tests.components.core.fake_stage:STAGE"
LABEL = "fakes"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def digests(store: Store, tmp_path: Path) -> list[str]:
    return [store.put_folder(numbers_folder(tmp_path / f"n{i}", i, i), "data").digest for i in (1, 2, 3)]


def arguments(
    store: Store, inputs: dict[str, str | Sequence[str]], out: Path | None = None, **values: object
) -> list[str]:
    """What follows the interpreter and `-m MODULE`."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    given = {name: value if isinstance(value, str) else json.dumps(value) for name, value in inputs.items()}
    outputs = {name: str(out / name / "digest") for name in ("total", "nothing")} if out is not None else {}
    places = {"store": store.uri, "run": "run-1", "label": LABEL}
    return command_line(DECLARATION, {**places, **texts}, given, outputs)[2:]


def recorded(store: Store, label: str = LABEL) -> StageRecord:
    """What the run has of a stage."""
    document = store.document(f"runs/run-1/stages/{label}.json")
    assert isinstance(document, dict)
    record = store.stage_record(document["key"])
    assert record is not None
    return record


def test_the_digest_of_each_output_is_written_and_empty_for_one_that_was_not_made(store, digests, tmp_path):
    assert main(arguments(store, {"numbers": digests[0], "more": ""}, tmp_path / "out", config={"factor": 2})) == 0

    total = (tmp_path / "out" / "total" / "digest").read_text()
    assert (store.fetch(total) / "total.json").read_text() == "4"
    assert (tmp_path / "out" / "nothing" / "digest").read_text() == ""
    assert recorded(store).outputs == {"total": total}


def test_a_list_of_digests_leaves_out_what_was_not_made(store, digests):
    assert main(arguments(store, {"numbers": digests[0], "more": [digests[1], "", digests[2]]})) == 0
    assert recorded(store).inputs == {"numbers": digests[0], "more": digests[1:]}
    assert recorded(store).result == {"total": 12}


def test_an_item_of_a_fan_out_is_part_of_configuration_and_label(store, digests):
    assert main(arguments(store, {"numbers": digests[0]}, shard="1/2")) == 0
    assert recorded(store, "fakes-1").config["shard"] == "1/2"


def test_placement_changes_no_key(store, digests):
    keys = []
    for threads in (1, 3):
        assert main(arguments(store, {"numbers": digests[0]}, placement={"threads": threads})) == 0
        keys.append(recorded(store).key)

    assert keys[0] == keys[1]
    document = store.document("runs/run-1/stages/fakes.json")
    assert isinstance(document, dict)
    assert document["cached"] is True


@pytest.mark.parametrize(
    ("values", "exit_code", "message"),
    [
        ({"config": {"fail": "data"}}, 2, "DataError: row 3 is no number\n  hint: mend row 3\n"),
        ({"config": {"fail": "bug"}}, 1, "StageFailed: fake stopped: ZeroDivisionError: division by zero\n"),
        ({"config": {"factr": 1}}, 2, "RecipeError: unknown key 'fakes.factr'\n  hint: did you mean 'factor'"),
        ({"config": {"factor": "much"}}, 2, "RecipeError: fakes.factor='much': Input should be a valid integer"),
        ({"config": "{no"}, 2, "RecipeError: --config is no JSON"),
        ({"config": "[1]"}, 2, "RecipeError: --config is '[1]', no JSON object"),
        ({"placement": {"threads": "many"}}, 2, "RecipeError: fakes.placement.threads='many'"),
    ],
)
def test_the_exit_code_is_that_of_the_error(store, digests, tmp_path, capsys, values, exit_code, message):
    assert main(arguments(store, {"numbers": digests[0]}, tmp_path / "out", **values)) == exit_code
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


def starts(store: Store) -> int:
    """How often the stage has run."""
    return events_path(store, "run-1", LABEL).read_text().count('"type": "start"')


def test_retries_of_a_cluster_repeat_a_refusal_and_the_next_start_runs_the_stage(store, digests, capsys, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise DataError("row 3 is no number", hint="mend row 3")

    command = arguments(store, {"numbers": digests[0]}, retries=3)
    with monkeypatch.context() as outside:
        outside.setattr(fake_stage, "run", refuse)
        for _ in range(4):
            assert main(command) == 2
            assert capsys.readouterr().err == "DataError: row 3 is no number\n  hint: mend row 3\n"
            assert starts(store) == 1

    assert main(command) == 0  # the user has mended what was refused, and runs the pipeline again
    assert starts(store) == 2
    assert recorded(store).result == {"total": 2}


def test_another_input_is_not_refused_for_the_first_one(store, digests, monkeypatch):
    assert main(arguments(store, {"numbers": digests[0]}, config={"fail": "data"}, retries=3)) == 2
    assert main(arguments(store, {"numbers": digests[1]}, config={"fail": "data"}, retries=3)) == 2
    assert starts(store) == 2


@pytest.mark.parametrize("retries", [0, 3])
@pytest.mark.parametrize(
    "error", [StoreError("the store is away"), ProcessKilled("killed"), OSError(28, "No space left on device")]
)
def test_what_may_pass_at_the_next_attempt_is_tried_again(store, digests, monkeypatch, error, retries):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(fake_stage, "run", fail)
    for attempt in (1, 2):
        assert main(arguments(store, {"numbers": digests[0]}, retries=retries)) != 0
        assert starts(store) == attempt


@pytest.mark.parametrize("error", [StageFailed("diverged", hint="lower the learning rate"), ValueError("bug")])
def test_a_stage_whose_work_failed_is_not_computed_again_by_retries(store, digests, capsys, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(fake_stage, "run", fail)
    shown = set()
    for _ in range(4):
        assert main(arguments(store, {"numbers": digests[0]}, retries=3)) == 1
        assert starts(store) == 1
        shown.add(capsys.readouterr().err)
    (text,) = shown
    assert text.startswith("StageFailed: ")
    assert "Traceback" not in text
    assert main(arguments(store, {"numbers": digests[0]}, retries=3)) == 1  # a user starts it again
    assert starts(store) == 2


def test_a_pod_that_is_killed_is_tried_again_and_resumes(store, digests, tmp_path):
    numbers = store.put_folder(numbers_folder(tmp_path / "many", *range(8)), "data").digest
    command = [sys.executable, "-m", "components.core.runtime.stage_command"]
    command += arguments(store, {"numbers": numbers}, tmp_path / "out", retries=3)
    environment = {**os.environ, fake_stage.HOLD: str(tmp_path / "hold")}
    for number, exit_code, done in ((signal.SIGTERM, 130, 3), (signal.SIGKILL, -signal.SIGKILL, 6)):
        is_held = fake_stage.hold_at(tmp_path / "hold", done)
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        wait_until(f"{done} steps", is_held)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == exit_code
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "out" / "total" / "digest").read_text() == recorded(store).outputs["total"]
    assert recorded(store).result == {"total": sum(range(8))}
    events = EventFile(events_path(store, "run-1", LABEL)).read()
    assert [event["done"] for event in events if "done" in event] == list(range(1, 9))  # no attempt began anew


ASKED_AGAIN = """
import atexit, os, runpy, shutil, signal
remove = shutil.rmtree

def ask():
    os.kill(os.getpid(), signal.SIGTERM)

def ask_and_remove(folder, **options):
    if os.path.exists(os.path.join(folder, "out")):
        ask()
    remove(folder, **options)

shutil.rmtree = ask_and_remove
atexit.register(ask)
runpy.run_module("components.core.runtime.stage_command", run_name="__main__", alter_sys=True)
"""
"""The program, which is asked to stop while it removes its folder, and again when it ends."""


def test_a_stage_that_is_asked_again_and_again_ends_as_one_that_is_asked_once(store, tmp_path):
    numbers = store.put_folder(numbers_folder(tmp_path / "many", *range(8)), "data").digest
    command = [sys.executable, "-c", ASKED_AGAIN, *arguments(store, {"numbers": numbers})]
    is_held = fake_stage.hold_at(tmp_path / "hold", 3)
    environment = {**os.environ, fake_stage.HOLD: str(tmp_path / "hold")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until("3 steps", is_held)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate()
    assert (process.returncode, told) == (130, "stopped; the same command goes on from here\n")
    events = list(EventFile(events_path(store, "run-1", LABEL)).read())
    assert events[-1]["type"] == "interrupted"
    assert list((store.local / "tmp").iterdir()) == []
    subprocess.run([*command[:1], "-m", "components.core.runtime.stage_command", *command[3:]], check=True)
    assert recorded(store).result == {"total": sum(range(8))}


def test_without_a_cluster_a_refusal_is_not_recorded(store, digests):
    for attempt in (1, 2):
        assert main(arguments(store, {"numbers": digests[0]}, config={"fail": "data"})) == 2
        assert starts(store) == attempt
    assert store.documents("runs/run-1/refusals/") == []


def test_an_input_that_is_missing_or_unknown_is_wrong_use(store, digests, capsys):
    assert main(arguments(store, {})) == 2
    assert main(arguments(store, {"numbers": digests[0], "n": digests[1]})) == 2
    error = capsys.readouterr().err
    assert "needs the input 'numbers'" in error
    assert "no input 'n'" in error


def test_a_container_explains_itself_without_torch_or_kfp():
    code = "import sys, atexit\nsys.argv[1:] = ['--help']\n"
    code += "atexit.register(lambda: print(sorted({'torch', 'kfp'} & sys.modules.keys())))\n"
    code += "import runpy; runpy.run_module('components.core.runtime.stage_command', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "Run one stage on artifacts of a store" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
