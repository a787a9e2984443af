"""Learning rates are those of their sources."""

import pytest

from pipelines.recipe.setting_rules import training as rules


@pytest.mark.parametrize(("parameters", "rate"), rules.PRETRAINING_RATES)
def test_learning_rates_of_the_table_are_met(parameters: float, rate: float) -> None:
    assert rules.pretraining_rate(int(parameters)) == pytest.approx(rate)


def test_learning_rates_fall_with_size_and_meet_the_papers() -> None:
    rates = [rules.pretraining_rate(int(10 ** (exponent / 10))) for exponent in range(50, 120)]
    assert rates == sorted(rates, reverse=True)
    of_8b = {setting.key: setting.value for setting in rules.learning_rates(8_000_000_000)}
    assert of_8b["sft.learning_rate"] == 1e-4  # LN-Nano
    of_7b = {setting.key: setting.value for setting in rules.learning_rates(7_000_000_000)}
    assert of_7b["rl.learning_rate"] == 1e-6  # DeepSeekMath
    of_demo = {setting.key: setting.value for setting in rules.learning_rates(720_000)}
    assert of_demo["rl.learning_rate"] == pytest.approx(1e-4, rel=0.02)  # what the demo's recipe has
