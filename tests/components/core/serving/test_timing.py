"""Times of models measured in turn: on an imaginary machine that changes its speed, and with real engines."""

import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.base.errors import StageFailed
from components.core.model.checkpoint import save_model
from components.core.serving.engine import BatchTime
from components.core.serving.load_profile import LoadProfile
from components.core.serving.timing import measure_times, without_drift
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


def test_models_of_any_architecture_are_measured_once_a_round(tmp_path: Path) -> None:
    tiny_models.llama(0).save_pretrained(tmp_path / "dense")
    save_model(tiny_models.heterogeneous(0), tmp_path / "heterogeneous", tokenizer=None)
    measured = measure_times([tmp_path / "dense", tmp_path / "heterogeneous"], SMALL_LOAD, threads=1)
    assert [len(times) for times in measured] == [3, 3]
    assert all(time.first_token_ms > 0 and time.step_ms > 0 for times in measured for time in times)


def test_models_too_large_for_one_process_are_measured_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.core.serving.timing.MAX_WEIGHT_BYTES", 0)
    tiny_models.llama(0).save_pretrained(tmp_path / "model")
    measured = measure_times([tmp_path / "model"] * 2, SMALL_LOAD, threads=1)
    assert [len(times) for times in measured] == [3, 3]


def test_a_model_that_vllm_cannot_run_fails_with_its_reason(tmp_path: Path) -> None:
    tiny_models.llama(0).save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(StageFailed, match=r"(?s)could not run the models.*[Ee]rror"):
        measure_times([tmp_path / "broken"], SMALL_LOAD, threads=1)
