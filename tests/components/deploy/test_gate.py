import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.base.errors import RecipeError
from components.deploy.config import DeployConfig, Gate
from components.deploy.gate import check, failed_checks, measurements

MEASURED: dict[str, Any] = {
    "accuracy": {"standard": {"on": 0.9, "off": 0.75}, "hard": {"on": 0.75, "off": 0.25}},
    "format": {"on": 1.0, "off": 0.875},
}


def values(gate: Gate, measured: dict[str, Any]) -> dict[str, tuple[float | None, bool]]:
    return {entry["check"]: (entry["value"], entry["passed"]) for entry in check(gate, measured)}


def test_each_check_finds_its_number():
    gate = Gate(min_accuracy=0.9, min_format=0.9, min_thinking_gain=0.5)

    assert values(gate, MEASURED) == {
        "min_accuracy": (0.9, True),  # the threshold itself passes
        "min_format": (0.875, False),  # the worse of the modes
        "min_thinking_gain": (0.5, True),  # on the hard split
    }


def test_the_interval_of_a_number_is_shown_and_does_not_decide():
    measured = {
        **MEASURED,
        "interval": {"standard": {"on": [0.85, 0.94], "off": None}},
        "gains": {"thinking": {"standard": None, "hard": {"value": 0.5, "low": 0.4375, "high": 0.5625}}},
    }
    gate = Gate(min_accuracy=0.9, min_format=0.5, min_thinking_gain=0.55)
    accuracy, kept, gain = check(gate, measured)

    assert (accuracy["interval"], accuracy["passed"]) == ([0.85, 0.94], True)
    assert (kept["interval"], kept["passed"]) == (None, True)
    assert (gain["interval"], gain["passed"]) == ([0.4375, 0.5625], False)
    assert failed_checks([accuracy, gain]) == "min_thinking_gain=0.55 (found 0.500, 95 % interval 0.438 to 0.562)"


def test_metrics_of_earlier_versions_have_no_interval_of_the_gain():
    (gain,) = check(Gate(min_thinking_gain=0.55), MEASURED)

    assert (gain["value"], gain["interval"]) == (0.5, None)
    assert failed_checks([gain]) == "min_thinking_gain=0.55 (found 0.5)"


def test_without_a_hard_split_the_gain_is_that_of_the_standard_one():
    measured = {**MEASURED, "accuracy": {"standard": {"on": 0.75, "off": 0.5}, "hard": {"on": None, "off": None}}}

    assert values(Gate(min_thinking_gain=0.2), measured) == {"min_thinking_gain": (0.25, True)}


@pytest.mark.parametrize(
    "measured",
    [
        {},
        {"accuracy": {"standard": {"on": None, "off": None}}, "format": {"on": None, "off": None}},
        {"accuracy": {"hard": {"on": 0.5, "off": None}}, "format": None},
        {"format": {"on": 1.0}},
    ],
)
def test_a_number_that_is_missing_does_not_pass(measured):
    gate = Gate(min_accuracy=0.0, min_format=0.0, min_thinking_gain=-1.0)

    assert set(values(gate, measured).values()) == {(None, False)}


def test_perplexity_is_compared_with_the_parents(tmp_path):
    models = {"parent": {"perplexity": 10.0}, "rl": {"perplexity": 12.0}, "sft": {"perplexity": None}}
    (tmp_path / "metrics.json").write_text(json.dumps({"models": models}))
    gate = Gate(max_perplexity_ratio=1.2)

    assert values(gate, measurements(tmp_path, "rl")) == {"max_perplexity_ratio": (1.2, True)}
    assert values(Gate(max_perplexity_ratio=1.1), measurements(tmp_path, "rl"))["max_perplexity_ratio"][1] is False
    assert values(gate, measurements(tmp_path, "sft")) == {"max_perplexity_ratio": (None, False)}


def test_a_check_without_a_threshold_is_not_made():
    assert check(Gate(), MEASURED) == []


def test_a_gain_of_just_the_threshold_passes_however_it_was_rounded():
    measured = {"accuracy": {"hard": {"on": 0.75, "off": 0.55}}}

    assert measured["accuracy"]["hard"]["on"] - measured["accuracy"]["hard"]["off"] < 0.2
    assert values(Gate(min_thinking_gain=0.2), measured)["min_thinking_gain"][1]


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_a_check_passes_exactly_where_the_number_reaches_the_threshold(threshold, value):
    (entry,) = check(Gate(min_accuracy=threshold / 1000), {"accuracy": {"standard": {"on": value / 1000}}})

    assert entry["passed"] == (value >= threshold)


def test_thresholds_out_of_range_are_refused():
    with pytest.raises(RecipeError, match=r"deploy\.gate\.min_format=90"):
        DeployConfig.parse({"gate": {"min_format": 90}}, where="deploy")
