"""Times side by side: a machine that changes its speed, made up, and one model alone, for real."""

import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.serving.engine import BatchTime
from components.core.serving.load_profile import LoadProfile
from components.core.serving.timing import at_one_pace, measure_times
from tests.components.core import tiny_models

MODELS = 4
PACE = st.floats(0.2, 5.0)


@given(
    paces=st.lists(st.lists(PACE, min_size=MODELS - 1, max_size=MODELS - 1), min_size=1, max_size=5),
    true=st.lists(st.tuples(st.floats(1.0, 100.0), st.floats(1.0, 100.0)), min_size=MODELS, max_size=MODELS),
)
def test_a_machine_that_changes_its_speed_changes_no_ratio(
    paces: list[list[float]], true: list[tuple[float, float]]
) -> None:
    def taken(model: int, pace: float) -> BatchTime:
        return BatchTime(*(pace * ms for ms in true[model]))

    pairs = [[(taken(0, pace), taken(1 + n, pace)) for n, pace in enumerate(of_round)] for of_round in paces]
    first, *others = at_one_pace(pairs)
    usual_ms = statistics.median(time.step_ms for time in first)
    for model, times in enumerate(others, start=1):
        assert [time.step_ms for time in times] == pytest.approx([usual_ms * true[model][1] / true[0][1]] * len(paces))


def test_one_disturbed_round_does_not_count() -> None:
    usual, slow = BatchTime(4.0, 2.0), BatchTime(40.0, 20.0)
    rounds = [[(usual, BatchTime(3.0, 1.0))], [(slow, BatchTime(30.0, 10.0))], [(usual, BatchTime(3.0, 1.0))]]
    assert at_one_pace(rounds) == [[usual, slow, usual], [BatchTime(3.0, 1.0)] * 3]


def test_a_model_alone_is_measured_as_often(tmp_path: Path) -> None:
    tiny_models.llama(0).save_pretrained(tmp_path / "model")
    deployment = LoadProfile(batch_size=2, prompt_tokens=4, new_tokens=4, rounds=3)
    (times,) = measure_times([tmp_path / "model"], deployment, threads=1)
    assert len(times) == 3
    assert all(time.first_token_ms > 0 and time.step_ms > 0 for time in times)
