"""Every step of the write protocol fails or dies, in both kinds of store: the same command again makes it good."""

import ast
import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import components
import pipelines
from components.core.base.errors import InputError
from components.core.base.fault_injection import VARIABLE, fault_point, reached
from tests.chaos.attempt import FAILED, Place, attempt
from tests.chaos.history import State, check_at_rest, check_end, check_steps, state
from tests.components.core.base.fault_points import POINTS

OF_RUNS = {"run.begun", "run.ending"}
OF_RANKS = {"rank.begun", "rank.computed"}
OF_CLEAN_UP = {"object.delete"}
OF_ANOTHER_MACHINE = {"pull.filled", "pull.cleared", "pull.named"}
EXIT_CODES = {"kill": -signal.SIGKILL, "fail": FAILED}


def new_place(uri: str, folder: Path, **options: str) -> Place:
    """A fresh store of the same kind."""
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key.startswith(("AWS_", "TESSERA_S3"))}
    return Place(f"{uri}-{folder.name}" if "://" in uri else str(folder / "store"), folder, environment, **options)


@pytest.fixture
def whole(store_uri: str, tmp_path: Path) -> tuple[State, dict[str, int]]:
    """What attempts without a fault leave, and how often one comes to each point."""
    place = new_place(store_uri, tmp_path / "whole")
    assert attempt(place, "count", clean=True) == 0
    return state(place), next(entry["points"] for entry in place.ledger if entry["what"] == "reached")


@contextlib.contextmanager
def told(fault: str) -> Iterator[None]:
    """Name the fault after which something is wrong."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{fault}: {error}") from error


@pytest.mark.parametrize("action", ["kill", "fail"])
def test_every_point_can_die_or_fail(
    store_uri: str, tmp_path: Path, whole: tuple[State, dict[str, int]], action: str
) -> None:
    expected, reached = whole
    for point, times in reached.items():
        fault = f"{point}:{(times + 1) // 2}={action}"
        with told(fault):
            place = new_place(store_uri, tmp_path / point)
            assert attempt(place, fault, clean=point in OF_CLEAN_UP) == EXIT_CODES[action]
            check_at_rest(place)
            assert attempt(place) == 0
            check_end(place, expected)


@pytest.mark.parametrize("action", ["kill", "fail"])
def test_another_machine_can_die_or_fail_while_it_takes_over(s3_uri: str, tmp_path: Path, action: str) -> None:
    for point in OF_ANOTHER_MACHINE:
        with told(f"{point}={action}"):
            here = new_place(s3_uri, tmp_path / point)
            there = replace(here, machine="there")
            assert attempt(here, "point.trimmed:2=kill") == EXIT_CODES["kill"]
            assert attempt(there, f"{point}={action}") == EXIT_CODES[action]
            assert attempt(there) == 0
            check_steps(there)
            check_at_rest(there)


def test_every_point_is_gone_through(s3_uri: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Together with the two tests above; those of whole runs and training processes have tests of their own."""
    reached: set[str] = set()
    for name, uri in {"s3": s3_uri, "folder": "folder"}.items():
        place = new_place(uri, tmp_path / name)
        assert attempt(place, "count", clean=True) == 0
        reached |= next(entry["points"] for entry in place.ledger if entry["what"] == "reached").keys()
    assert reached | OF_ANOTHER_MACHINE | OF_RUNS | OF_RANKS == POINTS.keys()


def test_the_list_names_the_points_of_the_code() -> None:
    folders = [Path(components.__path__[0]), Path(pipelines.__path__[0])]
    called = [
        node.args[0]
        for folder in folders
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fault_point"
    ]
    assert {node.value for node in called if isinstance(node, ast.Constant)} == POINTS.keys()
    assert all(isinstance(node, ast.Constant) for node in called)


@pytest.mark.parametrize("order", ["=kill", "event=sing", "event:x=kill", "event"])
def test_an_order_that_cannot_be_understood_is_refused(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, order)
    with pytest.raises(InputError, match="is no order\n  hint: write NAME"):
        fault_point("event")


def test_a_point_without_an_order_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    before = reached()
    fault_point("event")
    assert reached() == before
