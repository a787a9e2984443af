"""The rules give what their sources have, follow the data, and fit the memory."""

from dataclasses import replace
from typing import Any

import pytest

from components.core.model.accelerators import DEVICES
from components.core.model.architecture import Architecture
from components.core.training.step_memory import Step, step_memory
from components.data.data_facts import ChatFacts, CorpusFacts, DataFacts, ProblemFacts
from components.search.config import Limits
from components.search.costs.work_time import Computer
from pipelines.recipe.setting_rules import generation, search, training
from pipelines.recipe.setting_rules.all_settings import all_settings
from pipelines.recipe.setting_rules.facts import Facts
from tests.components.core.llama_8b import LLAMA_8B

LARGE = Architecture.from_config(LLAMA_8B)
SMALL = Architecture.from_config(
    {
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "tie_word_embeddings": True,
    }
)
LITTLE = Architecture.from_config(
    {**LLAMA_8B, "vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 256}
)
CORPUS = CorpusFacts(tokens=900_000, estimated=False, document_tokens=3000)
CHATS = ChatFacts(
    num_chats=3000, num_thinking=1500, tokens=600_000, chat_tokens=411, longest_chat=1003, answer_tokens=290
)
PROBLEMS = ProblemFacts(num_problems=805, prompt_tokens=90, question="1 + 1 =")
ALL = DataFacts(corpus=CORPUS, chats=CHATS, problems=PROBLEMS)


def facts(parent: Architecture = SMALL, data: DataFacts = ALL, gpus: int = 0) -> Facts:
    device = DEVICES["H100"] if gpus else DEVICES["CPU"]
    return Facts(parent, "bfloat16", 8192, data, Computer(device, max(1, gpus)), gpus, 2, 24 << 30)


def values(of: Facts, **limits: Any) -> dict[str, Any]:
    limited = replace(of, limits=Limits.parse(limits or {"latency_ms": "70%"}, where="--limits"))
    return {setting.key: setting.value for setting in all_settings(limited)}


def test_no_thinking_is_cut_away() -> None:
    found = values(facts())
    assert 411 <= found["sft.seq_len"] < 411 + 64
    assert 290 <= found["rl.max_tokens"] == found["eval.max_tokens"] < 290 + 32
    short = Facts(SMALL, "bfloat16", 256, ALL, Computer(DEVICES["CPU"]), 0, 2, 24 << 30)
    assert values(short)["sft.seq_len"] == 256  # more than that the parent cannot take
    assert values(short)["rl.max_tokens"] == values(short)["deploy.max_tokens"] == 256 - 90


def test_a_training_goes_through_no_more_than_it_has_and_has_time_for() -> None:
    found = values(facts())
    assert found["distill.num_steps"] * found["distill.global_batch_size"] * found["distill.seq_len"] <= 4 * 900_000
    few = values(facts(data=DataFacts(corpus=CorpusFacts(tokens=1000, estimated=False, document_tokens=100))))
    assert few["distill.num_steps"] * few["distill.global_batch_size"] * few["distill.seq_len"] <= 4 * 1000
    assert few["distill.global_batch_size"] == training.MIN_ROWS
    library = few["search.distillation.num_steps"] * few["search.batch_size"] * few["search.seq_len"]
    assert (
        library <= search.MIN_BLD_STEPS * search.CPU_BATCH_TOKENS
    )  # four times this text is less than the fewest steps
    some = CorpusFacts(tokens=100_000, estimated=False, document_tokens=100)
    bounded = values(facts(LITTLE, DataFacts(corpus=some)))
    steps = bounded["search.distillation.num_steps"]
    assert search.MIN_BLD_STEPS < steps
    assert steps * bounded["search.batch_size"] * bounded["search.seq_len"] <= 4 * 100_000
    much = facts(LARGE, DataFacts(corpus=CorpusFacts(tokens=10**12, estimated=True, document_tokens=3000)), gpus=8)
    large = values(much)
    tokens = large["distill.num_steps"] * large["distill.global_batch_size"] * large["distill.seq_len"]
    assert tokens <= training.MAX_DISTILLED_TOKENS
    assert large["distill.num_steps"] >= training.MIN_STEPS


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_a_step_fits_the_memory(gpus: int) -> None:
    of = facts(gpus=gpus)
    found = values(of)
    ranks = max(1, gpus)
    for stage in ("distill", "pretrain", "sft"):
        assert found[f"{stage}.global_batch_size"] >= ranks
        rows = -(-found[f"{stage}.global_batch_size"] // ranks)
        step = Step(
            found[f"{stage}.micro_batch_size"],
            rows,
            found[f"{stage}.seq_len"],
            found[f"{stage}.dtype"] == "bfloat16",
            ranks,
            bool(found.get(f"{stage}.activation_checkpointing")),
        )
        step = step.distilled_from(SMALL, "bfloat16") if stage == "distill" else step
        assert step_memory(SMALL, step).total <= of.process_bytes


def test_the_faster_precision_is_taken() -> None:
    assert values(facts())["distill.dtype"] == "float32"  # the processor of the table is slower in bfloat16
    assert values(facts(gpus=1))["distill.dtype"] == "bfloat16"


def processor(float32: float, bfloat16: float) -> Computer:
    rates = {"float32": float32, "bfloat16": bfloat16}
    return Computer(DEVICES["CPU"].model_copy(update={"flops": rates}))


def test_engines_compute_in_float32_where_bfloat16_is_slower_although_it_moves_half_the_bytes() -> None:
    of = facts()
    old = values(replace(of, computer=processor(80e9, 1e9)))
    assert old["serving.dtype"] == old["search.measurement"]["dtype"] == "float32"
    new = values(replace(of, computer=processor(80e9, 70e9)))  # generation waits for memory
    assert "serving.dtype" not in new
    assert "dtype" not in new["search.measurement"]
    assert "serving.dtype" not in values(replace(of, computer=processor(80e9, 1e9), stored="float32"))
    assert "serving.dtype" not in values(facts(gpus=1))


def test_slow_machines_learn_and_ask_less_but_never_too_little() -> None:
    chats, problems = CHATS.model_copy(update={"answer_tokens": 90}), PROBLEMS.model_copy(update={"num_problems": 2000})
    data = DataFacts(corpus=CORPUS, chats=chats, problems=problems)
    fast, slow, slowest = (
        values(replace(facts(data=data), computer=processor(rate, rate))) for rate in (4e12, 5e11, 1e9)
    )
    keys = ("rl.num_steps", "rl.prompts_per_step", "eval.num_problems")
    assert [fast[key] for key in keys] == [30, 8, 100]
    assert generation.MIN_RL_STEPS < slow["rl.num_steps"] < 30
    assert generation.MIN_PROBLEMS < slow["eval.num_problems"] <= 100
    assert [slowest[key] for key in keys] == [
        generation.MIN_RL_STEPS,
        generation.MIN_RL_PROMPTS,
        generation.MIN_PROBLEMS,
    ]
    assert slow["rl.max_problems"] <= slow["rl.num_steps"] * slow["rl.prompts_per_step"]
    assert fast["rl.samples_per_prompt"] == slowest["rl.samples_per_prompt"]  # a group has to have a spread


def test_slow_machines_score_and_judge_on_less_text_but_never_on_too_little() -> None:
    fast, slowest = (values(replace(facts(), computer=processor(rate, rate))) for rate in (4e13, 1e9))
    keys = ("search.scoring_batches", "eval.held_out.num_batches")
    assert [fast[key] for key in keys] == [search.MAX_SCORING_BATCHES, generation.MAX_TEXT_BATCHES]
    assert [slowest[key] for key in keys] == [1, generation.MIN_TEXT_BATCHES]
    rounds = [found["eval.workload"]["rounds"] for found in (fast, slowest)]
    assert rounds == [generation.MAX_ROUNDS, generation.MIN_ROUNDS]


def test_what_there_is_no_data_for_is_left_out() -> None:
    text = values(facts(data=DataFacts(corpus=CORPUS)))
    assert [text[stage] for stage in ("sft", "rl", "deploy")] == [None] * 3
    chats = values(facts(data=DataFacts(chats=CHATS, problems=PROBLEMS)))
    assert [chats[stage] for stage in ("search", "distill", "pretrain")] == [None] * 3
    assert "targets.speed_up" not in chats


def test_reinforcement_learning_is_left_out_where_its_learner_does_not_fit() -> None:
    large = values(facts(LARGE, gpus=8))
    assert large["rl"] is None
    assert not {"targets.rl_gain", "eval.num_problems"} & large.keys()  # its problems go with it
    small = facts(gpus=1)
    step = Step(values(small)["rl.micro_batch_size"], 1152, 90 + values(small)["rl.max_tokens"], True)
    assert step_memory(SMALL, step).total < small.process_bytes


def test_the_target_follows_from_the_limit() -> None:
    assert values(facts(), latency_ms="50%")["targets.speed_up"] == 1.9
    assert "targets.speed_up" not in values(facts(), parameters="50%")


def test_speed_is_judged_under_the_load_of_the_limit() -> None:
    for gpus in (0, 1):
        found = values(facts(gpus=gpus))
        load = {key: value for key, value in found["eval.workload"].items() if key != "rounds"}
        assert load.items() <= found["search.measurement"].items()
        assert found["search.measurement"].keys() - load.keys() <= {"dtype"}


def test_widths_are_whole_channels() -> None:
    odd = SMALL.model_copy(
        update={"blocks": tuple(block.model_copy(update={"intermediate_size": 1538}) for block in SMALL.blocks)}
    )
    assert values(facts(odd))["search.ffn_fractions"] == [1.0, 0.5]


@pytest.mark.parametrize("gpus", [0, 8])
def test_each_setting_has_a_reason_and_a_key_of_its_own(gpus: int) -> None:
    settings = all_settings(replace(facts(gpus=gpus), limits=Limits(latency_ms="70%")))
    assert len({setting.key for setting in settings}) == len(settings)
    assert all(len(setting.reason) > 10 and not setting.reason.endswith(".") for setting in settings)
