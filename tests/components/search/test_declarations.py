"""Which steps of the search have measured times in their results: those alone are bound to a device."""

import pytest

from components.eval.config import STAGE as EVAL
from components.eval.config import EvalConfig
from components.search.config import CostsConfig, ImportanceConfig, LibraryConfig, ScoresConfig, SearchConfig
from components.search.declarations import COSTS, IMPORTANCE, LIBRARY, SCORES, SEARCH

MEASURED_BEFORE = {"costs": "a digest"}


@pytest.mark.parametrize(
    ("settings", "inputs", "measures"),
    [
        ({}, MEASURED_BEFORE, False),
        ({}, {}, True),
        ({"measurement": {"device": "H100"}}, {}, False),
        ({"latency_feedback": {"max_rounds": 2}}, MEASURED_BEFORE, True),
        ({"fusion": {"timing": "decoder"}}, MEASURED_BEFORE, True),
    ],
)
def test_the_search_measures_what_no_stage_before_it_has(
    settings: dict[str, object], inputs: dict[str, object], measures: bool
) -> None:
    assert SEARCH.measures_time(SearchConfig.parse(settings), inputs) is measures


def test_costs_are_measured_unless_they_are_predicted_or_given() -> None:
    assert COSTS.measures_time(CostsConfig(), {})
    assert not COSTS.measures_time(CostsConfig(), {"own_costs": "a digest"})
    assert not COSTS.measures_time(CostsConfig.parse({"measurement": {"device": "H100"}}), {})


def test_the_evaluation_measures_speeds_and_the_other_steps_nothing() -> None:
    assert EVAL.measures_time(EvalConfig(), {})
    for stage, config in ((IMPORTANCE, ImportanceConfig()), (LIBRARY, LibraryConfig()), (SCORES, ScoresConfig())):
        assert not stage.measures_time(config, {})
