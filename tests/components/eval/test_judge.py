"""The judge asks two small HTTP servers that stand in for vLLM, and its command refuses the worse one."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.core.base.errors import InputError, TesseraError
from components.core.store.store import open_store
from components.core.text.problems import Problem
from components.eval.judge import judge, read_questions
from components.eval.paired_verdict import Finding
from pipelines.cli import run_command
from tests.vllm_standin import Behaviour, Standin, sums
from tests.waiting import PATIENCE_S

NAME = "nano"
ABSENT = "http://127.0.0.1:9/v1"


@contextlib.contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """A stand-in during the block; yields its base URL."""
    server = Standin(("127.0.0.1", 0), NAME, behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.drain()
        thread.join()


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A folder with 220 problems."""
    folder = tmp_path / "problems"
    folder.mkdir()
    (folder / "test-standard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(220)))
    return folder


def findings(problems: list[Problem], stable: Behaviour, canary: Behaviour) -> dict[str, Finding]:
    with serving(stable) as old, serving(canary) as new:
        return {each.name: each for each in ask((old, new), problems)}


def ask(servers: tuple[str, str], problems: list[Problem]) -> list[Finding]:
    return judge(servers, NAME, problems, tolerance=0.02, max_tokens=64, concurrency=16, timeout_s=PATIENCE_S)


def test_numbers_of_both_versions_are_those_of_their_answers(questions: Path) -> None:
    problems = read_questions(questions, 200)
    found = findings(problems, Behaviour("1"), Behaviour("2", wrong_fraction=0.3))
    assert found["correct"].stable == 1.0
    assert 0.6 < found["correct"].canary < 0.8
    assert {name for name, each in found.items() if each.is_worse} == {"correct"}
    assert (found["in format"].canary, found["failed"].canary, found["cut off"].canary) == (1.0, 0.0, 0.0)
    assert found["thinking, characters"].stable == pytest.approx(
        sum(len(f"I add {' and '.join(each.question.removesuffix('=').split('+'))}.") for each in problems) / 200
    )


def test_a_version_with_errors_and_one_with_a_wrong_chat_template_are_refused(questions: Path) -> None:
    problems = read_questions(questions, 200)
    broken = findings(problems, Behaviour("1"), Behaviour("2", error_fraction=0.1))
    assert broken["failed"].is_worse
    assert broken["failed"].canary == pytest.approx(0.1, abs=0.05)
    template = findings(problems, Behaviour("1"), Behaviour("2", wrong_template=True))
    assert {name for name, each in template.items() if each.is_worse} >= {"correct", "in format", "cut off"}


def test_a_stable_version_that_answers_nothing_is_named(questions: Path) -> None:
    problems = read_questions(questions, 200)
    with serving(Behaviour()) as new, pytest.raises(TesseraError, match="answered none of 200 questions"):
        ask((ABSENT, new), problems)


def test_too_few_questions_are_refused(questions: Path) -> None:
    with pytest.raises(InputError, match="50 questions are too few"):
        read_questions(questions, 50)
    with pytest.raises(InputError, match="has 220 questions, 400 are wanted"):
        read_questions(questions, 400)


def test_the_command_prints_the_table_and_its_exit_code_decides(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(tmp_path / "store")
    digest = store.put_folder(questions, "data").digest
    options = ["--model", NAME, "--problems", digest, "--store", store.uri]
    with serving(Behaviour("1")) as old, serving(Behaviour("2")) as equal, serving(Behaviour("3", 0.1)) as worse:
        assert run_command(["judge", old, equal, *options]) == 0
        table = capsys.readouterr().out
        assert "accepted" in table
        assert all(name in table for name in ("failed", "correct", "in format", "cut off", "thinking"))
        assert run_command(["judge", old, worse, *options]) == 1
        assert "refused: failed" in capsys.readouterr().out
        assert run_command(["judge", old, equal, *options, "--questions", "50"]) == 2
