"""A stage alone on a user's own files: `tessera stage`."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.core.base.errors import InputError, RecipeError, StageFailed
from components.core.store.store import StageRecord, Store, open_store
from pipelines.recipe import registry
from pipelines.run.single_stage import run_single
from tests.components.core.fake_stage import STAGE, numbers_folder


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake stage is in the list of stages."""
    monkeypatch.setitem(dict_of_stages(), "fake", "tests.components.core.fake_stage:STAGE")


def dict_of_stages() -> dict[str, str]:
    stages = registry.STAGES
    assert isinstance(stages, dict)
    return stages


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    return numbers_folder(tmp_path / "numbers", 1, 2, 3)


def run(
    store: Store,
    settings: dict[str, Any],
    inputs: Mapping[str, Sequence[str]],
    outputs: Mapping[str, Sequence[str]] | None = None,
) -> StageRecord:
    return run_single(STAGE, settings, inputs, outputs or {}, store, Console(file=io.StringIO()))


def test_outputs_are_written_where_they_are_wanted(store: Store, numbers: Path, tmp_path: Path) -> None:
    target = tmp_path / "made" / "total"
    record = run(store, {"factor": 2}, {"numbers": [str(numbers)]}, {"total": [str(target)]})

    assert json.loads((target / "total.json").read_text()) == 12
    assert (target / "total.json").stat().st_mode & 0o200  # a user's own file, not the store's
    assert record.outputs["total"] == store.put_folder(target, "table").digest


def test_a_second_call_computes_nothing_whatever_its_placement(store: Store, numbers: Path) -> None:
    first = run(store, {}, {"numbers": [str(numbers)]})
    again = run(store, {"placement": {"threads": 7}}, {"numbers": [str(numbers)]})

    assert again == first  # with the seconds that the first one took


def test_inputs_come_as_folder_digest_or_from_another_store(store: Store, numbers: Path, tmp_path: Path) -> None:
    other = open_store(tmp_path / "other")
    digest = other.put_folder(numbers, "data").digest
    more = [str(numbers), f"{other.uri}#{digest}", digest]
    record = run(store, {}, {"numbers": [f"{other.uri}#{digest}"], "more": more})

    assert record.result == {"total": 24}
    assert record.inputs == {"numbers": digest, "more": [digest] * 3}


def test_wrong_names_and_places_are_refused_before_anything_runs(store: Store, numbers: Path, tmp_path: Path) -> None:
    given = {"numbers": [str(numbers)]}
    with pytest.raises(InputError, match="no output 'totals'\n  hint: did you mean 'total'"):
        run(store, {}, given, {"totals": ["x"]})
    with pytest.raises(InputError, match="is there already"):
        run(store, {}, given, {"total": [str(numbers)]})
    with pytest.raises(InputError, match="no input 'n'"):
        run(store, {}, {"n": [str(numbers)]})
    with pytest.raises(InputError, match="no such file"):
        run(store, {}, {"numbers": [str(tmp_path / "absent")]})
    with pytest.raises(InputError, match="needs the input 'numbers'"):
        run(store, {}, {})
    with pytest.raises(RecipeError, match="did you mean 'factor'"):
        run(store, {"factr": 2}, given)
    with pytest.raises(RecipeError, match=r"placement\.threads='many'"):
        run(store, {"placement": {"threads": "many"}}, given)
    assert not (tmp_path / "store" / "runs").exists()


@pytest.mark.parametrize(
    ("fail", "raised", "message"),
    [
        ("data", InputError, r"stage fake: row 3 is no number\n  hint: mend row 3\n  log: .*fake\.log"),
        ("bug", StageFailed, "stage fake: fake stopped: ZeroDivisionError: division by zero"),
        ("crash", StageFailed, r"stage fake was killed by SIGABRT \(out of memory\?\); its log ends with: "),
    ],
)
def test_a_failure_is_told_from_the_event_or_the_exit_status(
    store: Store, numbers: Path, fail: str, raised: type[Exception], message: str
) -> None:
    with pytest.raises(raised, match=message):
        run(store, {"fail": fail}, {"numbers": [str(numbers)]})
