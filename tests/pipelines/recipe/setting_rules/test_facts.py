"""What stands for the child before there is one."""

from dataclasses import replace

from components.core.model.architecture import Architecture
from components.data.data_facts import DataFacts
from components.search.config import Limits
from pipelines.recipe.setting_rules.facts import first_layers, stand_in
from tests.components.core.llama_8b import LLAMA_8B
from tests.pipelines.recipe.setting_rules.test_all_settings import CHATS, facts, values


def test_the_child_is_counted_as_its_limits_leave_it() -> None:
    parent = Architecture.from_config(LLAMA_8B)
    assert len(stand_in(parent, Limits(latency_ms="50%")).blocks) == 16
    assert len(stand_in(parent, Limits(latency_ms=None, tokens_per_s="200%")).blocks) == 16
    small = stand_in(parent, Limits(latency_ms="90%", parameters="50%"))
    assert small.parameters <= parent.parameters / 2 < first_layers(parent, len(small.blocks) + 1).parameters
    assert stand_in(parent, Limits(latency_ms=3.0)) == parent


def test_without_a_corpus_the_parent_itself_is_trained() -> None:
    limited = replace(facts(), limits=Limits(latency_ms="50%"))
    assert limited.student.parameters < limited.parent.parameters
    tuned = replace(limited, data=DataFacts(chats=CHATS))
    assert tuned.student == tuned.parent


def test_a_small_child_is_trained_on_more_in_the_same_time() -> None:
    large, small = values(facts(), latency_ms="90%"), values(facts(), latency_ms="30%")
    for stage in ("distill", "pretrain", "sft"):
        assert small[f"{stage}.num_steps"] > 1.5 * large[f"{stage}.num_steps"]
    assert small["rl.num_steps"] >= large["rl.num_steps"]
