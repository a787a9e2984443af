"""The rules of what generates: serving, reinforcement learning, evaluation, deployment. Light.

Paper: Llama-Nemotron is arXiv 2505.00949.
"""

import math
from dataclasses import replace

from pydantic import JsonValue

from components.core.model.architecture import Architecture
from components.core.model.flops import forward_flops, training_flops
from components.core.training.step_memory import Step, step_memory
from components.data.config import DataConfig
from components.data.data_facts import ChatFacts, CorpusFacts, ProblemFacts
from components.eval.config import EvalConfig
from components.search.config import Measurement
from pipelines.recipe.setting_rules.facts import (
    CPU_MICRO_TOKENS,
    PROMPT_TOKENS,
    Facts,
    Setting,
    gflops,
    left_out,
    rounded_up,
)
from pipelines.recipe.setting_rules.training import learning_rate_of, text_seq_len

RL_SHARE = 2
"""Times as long that RL may take, most of it generation."""
MIN_RL_STEPS, MIN_RL_PROMPTS = 10, 4
"""Fewest steps of RL, and fewest problems of one."""
ANSWER_SHARE = 0.6
"""Mean length of answers as a share of the longest: 0.3 to 0.7 with SmolLM2-135M on two tasks of reasoning-gym."""
MIN_PROBLEMS = 50
"""Fewest problems of a split that every model is asked: ±14 points at the most."""
SEARCHED_MODELS = 3
"""Models of the evaluation that come from the search, and as many architectures: the best child, and two to compare."""
SPEED_SHARE, TEXT_SHARE = 1 / 4, 1 / 4
"""Times as long as a training that the evaluation may take for speed, and for held-out text."""
MIN_ROUNDS, MAX_ROUNDS, REPEATS = 3, 5, 4
"""Rounds in which speeds are measured, and times as many where the machine is noisy."""
MIN_TEXT_BATCHES, MAX_TEXT_BATCHES = 2, 8
"""Batches of held-out text."""
LEARNER_SHARE = 0.5
"""Share of the memory of a process that RL's learner may take; the rest is for the engine that generates."""
ANSWER_MULTIPLE = 32


def serving_settings(facts: Facts) -> list[Setting]:
    """Precision of the engines, where that of the parent's files is the slower one."""
    if served_dtype(facts) == facts.stored:
        return []
    rates = f"{gflops(facts.computer.flops(facts.stored))} GFLOPS in {facts.stored}"
    rates = f"{rates}, {gflops(facts.computer.flops('float32'))} in float32"
    return [Setting("serving.dtype", "float32", f"vLLM too multiplies at {rates} on {facts.computer.device.name}")]


def served_dtype(facts: Facts) -> str:
    """Precision of the engines: that of the parent's files, unless a processor is faster in float32.

    Float32 moves twice the bytes. It is faster where the processor has no instructions for bfloat16.
    """
    if facts.gpus or facts.stored == "float32":
        return facts.stored
    times = {
        dtype: answers_s(facts.parent, facts, dtype, 1, prompt_tokens=PROMPT_TOKENS)
        for dtype in (facts.stored, "float32")
    }
    return min(times, key=lambda dtype: times[dtype])


def answers_s(
    shape: Architecture,
    facts: Facts,
    dtype: str,
    number: int,
    *,
    at_once: int = 8,
    prompt_tokens: int,
    max_tokens: int = PROMPT_TOKENS,
) -> float:
    """Time in which one device gives answers.

    Args:
        shape: the model.
        facts: of the device.
        dtype: that the engine computes in.
        number: of answers.
        at_once: answers of a batch.
        prompt_tokens: tokens of a prompt.
        max_tokens: tokens of the longest answer.
    """
    known, tokens = facts.computer.computed_dtype(dtype), max(2, round(ANSWER_SHARE * max_tokens))
    load = Measurement(batch_size=at_once, prompt_tokens=prompt_tokens, new_tokens=tokens, dtype=known)
    return replace(facts.computer, count=1).generation_s(shape, load, number)


def workload(facts: Facts, problems: ProblemFacts | None) -> tuple[dict[str, JsonValue], str]:
    """The load that a model is made for, and why."""
    load: dict[str, JsonValue] = {"batch_size": 64 if facts.gpus else 8}
    reason = "users at the same time, a guess"
    if problems is not None:
        load["prompt_tokens"] = problems.prompt_tokens
        reason += "; prompts as long as 99 % of your problems"
    load["new_tokens"] = 64 if facts.gpus else 16
    return load, reason


def answer_length(answer_tokens: int, prompt_tokens: int, context: int) -> int:
    """Longest answer: with its thinking, as far as the context has room for it behind a prompt.

    Args:
        answer_tokens: that 99 % of the answers in the chats have at most.
        prompt_tokens: of a prompt.
        context: the longest text that the model takes, tokens.
    """
    return min(rounded_up(answer_tokens, ANSWER_MULTIPLE), max(1, context - prompt_tokens))


def _answer_length(facts: Facts, chats: ChatFacts, prompt_tokens: int) -> tuple[int, str]:
    """Longest answer by the chats, and the reason."""
    length = answer_length(chats.answer_tokens, prompt_tokens, facts.context)
    return length, f"99 % of the answers in your chats have at most {chats.answer_tokens:,} tokens, thinking included"


def rl_settings(facts: Facts, chats: ChatFacts, problems: ProblemFacts, dtype: Setting) -> list[Setting]:
    """GRPO."""
    length, why = _answer_length(facts, chats, problems.prompt_tokens)
    steps, prompts, samples, rates = rollout_settings(facts, problems.prompt_tokens, length, str(dtype.value))
    num_prompts, num_samples, num_steps = (int(str(setting.value)) for setting in (prompts, samples, steps))
    row = problems.prompt_tokens + length
    most = max(1, min(num_prompts * num_samples, CPU_MICRO_TOKENS * (8 if facts.gpus else 1) // row))
    micro = _learner_batch(facts, row, most, str(dtype.value))
    if micro is None:
        size = f"{facts.parent.parameters / 1e9:,.1f} B parameters"
        return left_out(("rl",), f"its learner is one process, and the state of {size} does not fit beside an engine")
    drawn = min(problems.num_problems, num_steps * num_prompts)
    return [
        Setting("rl.max_tokens", length, why),
        steps,
        prompts,
        samples,
        Setting("rl.max_problems", drawn, f"of your {problems.num_problems:,}; a step takes {num_prompts}"),
        rates,
        Setting("rl.micro_batch_size", micro, f"answers and prompts of up to {row:,} tokens"),
        learning_rate_of("rl", facts.parent.parameters),
        Setting("rl.dtype", dtype.value, dtype.reason),
    ]


def rollout_settings(
    facts: Facts, prompt_tokens: int, max_tokens: int, dtype: str
) -> tuple[Setting, Setting, Setting, Setting]:
    """Steps of RL, problems of a step, answers to each, and answers by which pass rates are measured.

    Args:
        facts: of device and parent.
        prompt_tokens: tokens of a prompt.
        max_tokens: tokens of an answer.
        dtype: of the learner.
    """
    steps, prompts, samples, rates = (100, 72, 16, 8) if facts.gpus else (30, 8, 8, 2)

    def affordable(prompts: int) -> int:
        answers = prompts * samples
        rollout_s = answers_s(
            facts.student,
            facts,
            served_dtype(facts),
            answers,
            at_once=answers,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
        )
        row = prompt_tokens + round(ANSWER_SHARE * max_tokens)
        flops = training_flops(facts.student, answers * row, row)
        learning_s = replace(facts.computer, count=1).computing_s(flops, dtype)
        return int(RL_SHARE * facts.stage_s / (rollout_s * (1 + rates / samples) + learning_s))

    while affordable(prompts) < MIN_RL_STEPS and prompts > MIN_RL_PROMPTS:
        prompts //= 2
    steps = max(MIN_RL_STEPS, min(steps, affordable(prompts)))
    paper = "arXiv 2505.00949, section 5.1"
    fewer = "as the paper" if facts.gpus else "the paper has {}; fewer on a CPU"
    number = f"the paper's figure 5 shows about 500; at most {facts.time_in_words(1 / RL_SHARE)}"
    number += f", but {MIN_RL_STEPS} steps at least"
    return (
        Setting("rl.num_steps", steps, number),
        Setting("rl.prompts_per_step", prompts, f"{fewer.format(72)} ({paper})"),
        Setting("rl.samples_per_prompt", samples, f"{fewer.format(16)} ({paper})"),
        Setting("rl.pass_rate_samples", rates, f"{fewer.format(8)} ({paper})"),
    )


def _learner_batch(facts: Facts, row: int, most: int, dtype: str) -> int | None:
    """Answers that RL's learner computes at a time; None where one does not fit."""
    for size in range(most, 0, -1):
        step = Step(size, 2 * most, row, dtype == "bfloat16", on_gpu=facts.gpus > 0)
        if step_memory(facts.parent, step).total <= LEARNER_SHARE * facts.process_bytes:
            return size
    return None


def eval_settings(
    facts: Facts, chats: ChatFacts | None, corpus: CorpusFacts | None, problems: ProblemFacts | None
) -> list[Setting]:
    """How every model is asked, and the text for perplexity."""
    if corpus is None and problems is None:
        return left_out(("eval",), "neither a corpus nor problems")
    found = []
    if chats is not None and problems is not None:
        found += _questions(facts, chats, problems)
    if corpus is not None:
        seq_len, why = text_seq_len(corpus, facts.context, on_gpu=facts.gpus > 0)
        load, _ = workload(facts, problems)
        load["rounds"] = speed_rounds(facts, Measurement.parse(load, where="eval.workload"))
        reason = "the load of the search: limits and target are about it; up to four times as many rounds on a noisy "
        found += [
            Setting("eval.held_out.seq_len", seq_len, why),
            held_out_batches(facts, seq_len),
            Setting("eval.workload", load, f"{reason}machine, {facts.time_in_words(1 / SPEED_SHARE)}"),
        ]
    if facts.gpus > 1:
        found.append(Setting("eval.placement", {"gpus": facts.gpus}, "a replica on each GPU"))
    return found


def _questions(facts: Facts, chats: ChatFacts, problems: ProblemFacts) -> list[Setting]:
    """Length of answers, how many problems, and how many answers to each."""
    length, why = _answer_length(facts, chats, problems.prompt_tokens)
    most, samples = (250, 4) if facts.gpus else (100, 2)
    tuned, at_once = 2, EvalConfig().concurrency
    searched = SEARCHED_MODELS + 2 if facts.data.corpus else 0  # with the distilled and the pretrained one
    times = [
        answers_s(
            shape,
            facts,
            served_dtype(facts),
            at_once,
            at_once=at_once,
            prompt_tokens=problems.prompt_tokens,
            max_tokens=length,
        )
        for shape in (facts.parent, facts.student)
    ]
    problem_s = (times[0] + (searched + tuned) * times[1]) * (samples + 1) / at_once
    number = max(MIN_PROBLEMS, min(most, int(facts.stage_s / problem_s)))
    number = min(number, max(1, round(DataConfig().test_fraction * problems.num_problems)))
    reason = (
        f"of each split; ±{98 / math.sqrt(number):.0f} points at the most; all {1 + searched + tuned} models answer "
    )
    reason += f"within {facts.time_in_words(1)}, but {MIN_PROBLEMS} at least where there are as many"
    paper = "answers that differ; the paper has up to 16 (arXiv 2505.00949, section 7)"
    return [
        Setting("eval.max_tokens", length, why),
        Setting("eval.num_problems", number, reason),
        Setting("eval.num_samples", samples, paper),
    ]


def held_out_batches(facts: Facts, seq_len: int) -> Setting:
    """Batches of text for the perplexity of every model."""
    rows = EvalConfig().held_out.batch_size
    tokens = rows * seq_len
    shapes = [facts.parent] + (SEARCHED_MODELS + 4) * [facts.student]  # distilled, pretrained, fine-tuned, reinforced
    batch_s = facts.computer.computing_s(sum(forward_flops(shape, tokens, seq_len) for shape in shapes), "float32")
    batches = max(MIN_TEXT_BATCHES, min(MAX_TEXT_BATCHES, int(TEXT_SHARE * facts.stage_s / batch_s)))
    reason = f"{batches * tokens:,} tokens of every model, {facts.time_in_words(1 / TEXT_SHARE)}"
    return Setting("eval.held_out.num_batches", batches, f"{reason}, but {MIN_TEXT_BATCHES * tokens:,} at least")


def speed_rounds(facts: Facts, load: Measurement) -> int:
    """Rounds of measuring speeds, in each of which the parent is measured before every other architecture."""
    known = load.model_copy(update={"dtype": facts.computer.computed_dtype(served_dtype(facts))})
    one = replace(facts.computer, count=1)
    round_s = SEARCHED_MODELS * sum(
        one.generation_s(shape, known, load.batch_size) for shape in (facts.parent, facts.student)
    )
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(SPEED_SHARE * facts.stage_s / REPEATS / round_s)))


def deploy_settings(facts: Facts, chats: ChatFacts | None, problems: ProblemFacts | None) -> list[Setting]:
    """Gate and smoke test."""
    if chats is None:
        return left_out(("deploy",), "a model without chats has not learned the switch that the smoke test asks for")
    length, why = _answer_length(facts, chats, problems.prompt_tokens if problems else PROMPT_TOKENS)
    found = [Setting("deploy.max_tokens", length, why)]
    if problems is not None:
        found += [
            Setting("deploy.gate.min_format", 0.9, "a model that loses its format is not promoted"),
            Setting("deploy.questions", [problems.question], "a short one of your problems"),
        ]
    return found
