"""What a recipe leaves out follows from the parent, the sizes of the data and the kind of device, as `init` chooses."""

from typing import Any

import pytest

from components.core.model.architecture import Architecture
from components.search.config import Limits
from pipelines.recipe.filled_settings import NODE_GPUS, ParentFacts, filled_settings
from pipelines.recipe.schema import Recipe, rules_of
from pipelines.recipe.setting_rules.training import MAX_EPOCHS
from pipelines.recipe.source_files import SourceSize
from tests.components.core.llama_8b import LLAMA_8B
from tests.pipelines.recipe.setting_rules.test_all_settings import LITTLE, SMALL, facts, values

TEXT = SourceSize(num_bytes=3_600_000, row_bytes=12_000)
"""Of the 900,000 tokens that the tests of the rules have, in documents of up to 3,000."""


def filled(text: dict[str, Any], parent: Architecture = SMALL, **known: Any) -> dict[str, Any]:
    """What the rules choose beside the settings of a recipe."""
    recipe = Recipe.parse({"name": "x", **text})
    found = filled_settings(recipe.ruled_sections, ParentFacts(parent, "bfloat16", 8192, **known))
    assert all(len(setting.reason) > 10 and not setting.reason.endswith(".") for setting in found)
    assert len({setting.key for setting in found}) == len(found)
    return {setting.key: setting.value for setting in found}


def test_a_step_has_as_many_tokens_whatever_the_length_of_its_rows() -> None:
    for seq_len, rows, micro in ((128, 32, 16), (512, 8, 4), (1024, 4, 2), (8192, 4, 1), (100, 32, 16)):
        found = filled({"sft": {"seq_len": seq_len}})
        assert (found["sft.global_batch_size"], found["sft.micro_batch_size"]) == (rows, micro)
    own_rows = filled({"sft": {"seq_len": 128, "global_batch_size": 3}})
    assert own_rows["sft.micro_batch_size"] == 2  # no more than there are, and a power of two


def test_what_is_left_out_is_what_init_writes_for_such_a_machine() -> None:
    found = filled({}, corpus=TEXT, limits=Limits(latency_ms="70%"))
    by_init = values(facts())  # two threads of the same processor, and as much text
    same = [f"{stage}.learning_rate" for stage in ("distill", "pretrain", "sft", "rl")]
    same += [f"{stage}.{key}" for stage in ("distill", "pretrain", "search") for key in ("seq_len", "dtype")]
    same += ["search.ffn_fractions", "search.batch_size", "eval.held_out.seq_len", "sft.dtype", "rl.dtype"]
    same += ["search.scoring_batches", "eval.held_out.num_batches"]
    same += [f"rl.{key}" for key in ("num_steps", "prompts_per_step", "samples_per_prompt", "pass_rate_samples")]
    assert {key: found[key] for key in same} == {key: by_init[key] for key in same}
    for stage in ("distill", "pretrain"):
        assert found[f"{stage}.global_batch_size"] == by_init[f"{stage}.global_batch_size"]
        assert found[f"{stage}.num_steps"] == pytest.approx(2 * by_init[f"{stage}.num_steps"], abs=2)  # one thread
    without = filled({"sft": None, "eval": None, "search": {"intermediate_sizes": [256]}})
    assert {key.partition(".")[0] for key in without} == {"search", "distill", "pretrain", "rl"}
    assert "search.ffn_fractions" not in without


def test_a_gpu_computes_in_bfloat16_longer_rows_and_more_of_them() -> None:
    sections = frozenset(("search", "distill", "pretrain", "sft", "rl", "eval"))
    found = filled({}, corpus=TEXT, on_gpu=sections)
    by_init = values(facts(gpus=1))
    for key in ("distill.dtype", "distill.seq_len", "search.batch_size", "eval.held_out.seq_len", "rl.num_steps"):
        assert found[key] == by_init[key]
    assert (found["distill.dtype"], found["distill.seq_len"]) == ("bfloat16", 4096)
    assert found["distill.global_batch_size"] == NODE_GPUS  # a row for each
    tokens = found["distill.num_steps"] * found["distill.global_batch_size"] * found["distill.seq_len"]
    assert 3 * 900_000 < tokens <= MAX_EPOCHS * 900_000
    alone = filled({}, corpus=TEXT, on_gpu=frozenset(("sft",)))
    assert (alone["sft.dtype"], alone["distill.dtype"]) == ("bfloat16", "float32")


def test_steps_follow_from_what_the_recipe_sets_itself() -> None:
    own = filled({"distill": {"seq_len": 256, "global_batch_size": 10}}, corpus=TEXT)
    free = filled({}, corpus=TEXT)
    tokens = free["distill.num_steps"] * free["distill.global_batch_size"] * free["distill.seq_len"]
    assert own["distill.num_steps"] * 2560 == pytest.approx(tokens, abs=2560)
    assert filled({"distill": {"num_steps": 7}}, corpus=TEXT)["distill.global_batch_size"] == 8  # of 512 tokens
    slow = filled({"search": {"dtype": "bfloat16"}}, LITTLE, corpus=TEXT)["search.distillation.num_steps"]
    assert slow < filled({}, LITTLE, corpus=TEXT)["search.distillation.num_steps"]
    assert not {"distill.num_steps", "distill.seq_len", "search.batch_size"} & filled({}).keys()


def test_little_text_is_repeated_four_times_and_a_large_parent_has_time_for_less() -> None:
    little = filled({}, corpus=SourceSize(4000, 400))
    assert little["pretrain.num_steps"] * little["pretrain.global_batch_size"] * little["pretrain.seq_len"] <= 4000
    large = filled({}, Architecture.from_config(LLAMA_8B), corpus=TEXT)
    assert large["distill.num_steps"] < filled({}, corpus=TEXT)["distill.num_steps"]


@pytest.mark.parametrize(("chat_bytes", "seq_len", "rows"), [(900, 320, 8), (3000, 1024, 4), (90_000, 8192, 4)])
def test_rows_of_chats_are_as_long_as_their_bytes_let_expect(chat_bytes: int, seq_len: int, rows: int) -> None:
    chats = SourceSize(100 * chat_bytes, chat_bytes)
    found = filled({"sft": {"num_steps": 9}}, chats=chats)
    assert found["sft.seq_len"] == seq_len  # 3 bytes a token, in 64s, and no more than the parent takes
    assert found["sft.global_batch_size"] == rows
    assert "pretrain.seq_len" not in found
    own = filled({"sft": {"seq_len": 128, "num_steps": 9}}, chats=chats)
    assert own["sft.global_batch_size"] == 32
    steps = filled({"sft": {"seq_len": 128, "global_batch_size": 4}}, chats=SourceSize(30_000, 300))["sft.num_steps"]
    assert steps == MAX_EPOCHS * 10_000 // (4 * 128)


ASKED = ("rl", "eval", "deploy")
"""Sections with answers."""


def answer_lengths(text: dict[str, Any], **known: Any) -> list[int]:
    found = filled(text, **known)
    return [found[f"{section}.max_tokens"] for section in ASKED]


def test_an_answer_may_be_as_long_as_a_chat_and_leaves_room_for_its_prompt() -> None:
    chats, long = SourceSize(300_000, 3000), SourceSize(9_000_000, 90_000)
    assert answer_lengths({}, chats=chats) == [1024] * 3  # 1,000 tokens of 3 bytes, in 32s
    assert answer_lengths({}, chats=long) == [8192 - 128] * 3
    assert answer_lengths({}, chats=long, problems=SourceSize(9000, 900)) == [8192 - 300] * 3
    assert answer_lengths({}, chats=long, problems=long) == [4096] * 3  # the row of a problem has its solution too
    limited = {"eval": 1000, "deploy": 200}
    assert answer_lengths({}, chats=chats, max_model_len=limited) == [1024, 1000 - 128, 200 - 100]
    assert not {f"{section}.max_tokens" for section in ASKED} & filled({}, corpus=TEXT).keys()


def test_a_search_that_is_scored_on_problems_has_as_long_answers() -> None:
    chats = SourceSize(num_bytes=900_000, row_bytes=3000)
    scored = filled({"search": {"score": "accuracy", "task": {"num_problems": 8}}, "eval": {}}, chats=chats)
    assert scored["search.task.max_tokens"] == scored["eval.max_tokens"]
    assert "search.task.max_tokens" not in filled({}, chats=chats)


def test_the_learner_computes_as_many_answers_at_a_time_as_their_length_allows() -> None:
    chats = SourceSize(30_000, 300)
    assert filled({}, chats=chats)["rl.micro_batch_size"] == 2048 // (128 + 128)
    assert filled({"rl": {"max_tokens": 384}}, chats=chats)["rl.micro_batch_size"] == 2048 // (128 + 384)
    assert filled({}, chats=SourceSize(30_000, 30_000))["rl.micro_batch_size"] == 1
    assert "rl.micro_batch_size" not in filled({})


def test_a_recipe_without_a_parent_of_its_own_has_no_rules() -> None:
    assert rules_of(Recipe.parse({"name": "x"})) == []
    assert rules_of(Recipe.parse({"name": "x", "parent": "run://demo-1/distilled"})) == []
