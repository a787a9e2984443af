"""Times of models measured in turn: on an imaginary machine that changes its speed, and with real engines."""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.base.errors import StageFailed
from components.core.model.checkpoint import save_model
from components.core.runtime.context import StageContext
from components.core.serving.engine import BatchTime
from components.core.serving.load_profile import LoadProfile
from components.core.serving.start_report import STARTING
from components.core.serving.timing import (
    TimingReport,
    measure_times,
    needs_round,
    relative_error,
    without_drift,
)
from tests.components.conftest import Recorder
from tests.components.core import tiny_models

MODELS = 4
SPEED = st.floats(0.2, 5.0)
SMALL_LOAD = LoadProfile(batch_size=2, prompt_tokens=4, new_tokens=4, rounds=3)


@given(
    speeds=st.lists(st.lists(SPEED, min_size=MODELS - 1, max_size=MODELS - 1), min_size=1, max_size=5),
    true=st.lists(st.tuples(st.floats(1.0, 100.0), st.floats(1.0, 100.0)), min_size=MODELS, max_size=MODELS),
)
def test_a_machine_that_changes_its_speed_changes_no_ratio(
    speeds: list[list[float]], true: list[tuple[float, float]]
) -> None:
    def measured(model: int, speed: float) -> BatchTime:
        return BatchTime(*(speed * ms for ms in true[model]))

    rounds = [[(measured(0, speed), measured(1 + n, speed)) for n, speed in enumerate(row)] for row in speeds]
    first, *others = without_drift(rounds)
    usual_ms = statistics.median(time.step_ms for time in first)
    for model, times in enumerate(others, start=1):
        assert [time.step_ms for time in times] == pytest.approx([usual_ms * true[model][1] / true[0][1]] * len(speeds))


def test_one_disturbed_round_does_not_count() -> None:
    usual, slow = BatchTime(4.0, 2.0), BatchTime(40.0, 20.0)
    rounds = [[(usual, BatchTime(3.0, 1.0))], [(slow, BatchTime(30.0, 10.0))], [(usual, BatchTime(3.0, 1.0))]]
    assert without_drift(rounds) == [[usual, slow, usual], [BatchTime(3.0, 1.0)] * 3]


def test_models_of_any_architecture_are_measured_once_a_round(
    recorded_context: StageContext, recorder: Recorder, tmp_path: Path
) -> None:
    tiny_models.llama(0).save_pretrained(tmp_path / "dense")
    save_model(tiny_models.heterogeneous(0), tmp_path / "heterogeneous", tokenizer=None)
    measured = measure_times(
        [tmp_path / "dense", tmp_path / "heterogeneous"],
        SMALL_LOAD,
        threads=1,
        memory_gib=8.0,
        report=TimingReport.to_context(recorded_context, "times"),
    )
    assert [len(times) for times in measured] == [3, 3]
    assert all(time.first_token_ms > 0 and time.step_ms > 0 for times in measured for time in times)
    reports = [(event["done"], event["total"]) for event in recorder.events if event["what"] == "times"]
    assert reports == [(done, 8) for done in range(1, 9)]  # two engines, and two batches in each of three rounds
    phases = [what for what, _ in itertools.groupby(event["what"] for event in recorder.events)]
    assert phases == [STARTING, "times"] * 2  # while nothing is measured, for how long already


@pytest.mark.parametrize(
    ("memory_gib", "processes"),
    [
        (8.0, [["0", "1", "2"]]),
        (0.3, [["0", "1"], ["0", "2"]]),
        (0.1, [["0"], ["1"]] * 2 + [["0"], ["2"]] * 2),
    ],
)
def test_every_model_is_measured_right_after_the_first_in_every_round_whatever_the_memory(
    memory_gib: float, processes: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of an engine takes 64 MiB here; the imaginary machine gets slower with every pair it measures."""
    true_ms, opened, speeds = {"0": 4.0, "1": 2.0, "2": 3.0}, [], itertools.count(2)

    def measure_in_process(folders: list[Path], settings: Any, _: object) -> list[list[BatchTime]]:
        opened.append([folder.name for folder in folders])
        first, *others = opened[-1]
        turns = [name for other in others for name in (first, other)] or [first]
        return [
            [BatchTime(*[true_ms[name] * (next(speeds) // 2)] * 2) for name in turns]
            for _ in range(settings.profile.rounds)
        ]

    for name in true_ms:
        tiny_models.llama(0).save_pretrained(tmp_path / name)
    monkeypatch.setattr("components.core.serving.timing._measure_in_process", measure_in_process)
    load = SMALL_LOAD.model_copy(update={"rounds": 2})
    measured = measure_times([tmp_path / name for name in true_ms], load, 1, memory_gib)
    assert opened == processes
    first, *others = ([time.step_ms for time in model] for model in measured)
    usual = statistics.median(first)
    assert others == [pytest.approx([usual / 2] * 2), pytest.approx([usual * 3 / 4] * 2)]


def test_engines_are_opened_one_at_a_time_where_memory_is_short(tmp_path: Path) -> None:
    tiny_models.llama(0).save_pretrained(tmp_path / "model")
    once = SMALL_LOAD.model_copy(update={"rounds": 1})
    reports: list[tuple[int, int]] = []
    measured = measure_times(
        [tmp_path / "model"] * 2,
        once,
        threads=1,
        memory_gib=0.0,
        report=TimingReport(lambda done, total: reports.append((done, total))),
    )
    assert [len(times) for times in measured] == [1, 1]
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]  # an engine and a batch, twice


def test_a_model_that_vllm_cannot_run_fails_with_its_reason(tmp_path: Path) -> None:
    tiny_models.llama(0).save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(StageFailed, match=r"(?s)could not run the models.*[Ee]rror"):
        measure_times([tmp_path / "broken"], SMALL_LOAD, threads=1, memory_gib=8.0)


def test_rounds_are_repeated_until_the_step_times_are_known() -> None:
    def rounds(*steps_ms: float) -> list[list[BatchTime]]:
        return [[BatchTime(9.0, 5.0), BatchTime(9.0, step)] for step in steps_ms]

    assert needs_round([], 1, math.inf)
    assert needs_round(rounds(1.0), 2, math.inf)
    assert not needs_round(rounds(1.0, 2.0), 2, math.inf)
    assert needs_round(rounds(1.0, 2.0), 2, 0.03)
    assert needs_round(rounds(1.0), 1, 0.03)  # of one value nothing is known
    assert not needs_round(rounds(1.0, 1.0), 2, 0.03)
    assert not needs_round(rounds(*[1.0, 2.0] * 4), 2, 0.03)  # as often as it may be


def test_the_error_of_a_speed_is_that_of_a_mean() -> None:
    assert relative_error([9.0, 11.0, 9.0, 11.0]) == pytest.approx(1.959963984540054 * math.sqrt(4 / 3) / 2 / 10)
    assert relative_error([3.0]) == math.inf
    assert relative_error([3.0, 3.0]) == 0
