"""A key of an earlier version: the error names the new one."""

import pytest

from components.core.base.errors import RecipeError
from components.data.config import DataConfig
from components.rl.config import RlConfig
from components.search.config import SearchConfig


@pytest.mark.parametrize(
    ("config", "values", "hint"),
    [
        (DataConfig, {"test_share": 0.1}, "test_share is called test_fraction now"),
        (DataConfig, {"arithmetic": {"hard_share": 0.1}}, "hard_share is called hard_fraction now"),
        (RlConfig, {"thinking_off_share": 0.1}, "thinking_off_share is called thinking_off_fraction now"),
        (SearchConfig, {"truth": {}}, "truth is called latency_feedback now"),
        (SearchConfig, {"latency_feedback": {"rounds": 3}}, "rounds is called max_rounds now"),
        (SearchConfig, {"allow_unserved": True}, "allow_unserved is called allow_plugin_only_blocks now"),
        (SearchConfig, {"distillation": {"small_error": 1}}, "small_error is called skip_below_error now"),
    ],
)
def test_an_old_key_is_refused_with_the_new_one(config, values, hint):
    with pytest.raises(RecipeError) as caught:
        config.parse(values)
    assert caught.value.hint == hint
