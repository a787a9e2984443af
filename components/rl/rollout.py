"""Rollouts: vLLM samples answers, the environment scores them."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from components.core.base.errors import StageFailed
from components.core.serving.engine import Engine
from components.rl.reward import Environment, Reward


@dataclass(frozen=True)
class Problem:
    """A problem as a prompt in one mode."""

    id: str
    prompt_ids: list[int]
    expected: str
    mode: str


@dataclass(frozen=True)
class Answer:
    """One sampled answer and its reward."""

    problem: Problem
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Log-probability of each token under the weights that sampled it, nats."""
    version: int
    """Version of those weights."""
    reward: Reward


def roll_out(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    environment: Environment,
    *,
    samples: int,
    temperature: float,
    max_tokens: int,
    eos: int,
    seed: int,
) -> list[list[Answer]]:
    """Sample a group of answers to each problem, and score them.

    Each request has its own seed, so that equal weights give equal answers in another process.

    Returns:
        One list per problem, without the problems whose scoring failed.
    """
    results = engine.generate(
        [problem.prompt_ids for problem in problems],
        n=samples,
        temperature=temperature,
        max_tokens=max_tokens,
        seeds=[(seed * 1_000_003 + number * 1009) % (1 << 31) for number in range(len(problems))],
        stop_token_ids=[eos],
        logprobs=True,
    )
    groups = []
    for problem, group in zip(problems, results, strict=True):
        answers = []
        for sample in group:
            text = answer_text(tokenizer, sample.token_ids, eos)
            reward = environment.score(problem.id, text, problem.expected, problem.mode)
            if reward is not None:
                answers.append(Answer(problem, sample.token_ids, sample.logprobs or (), sample.weight_version, reward))
        if len(answers) == samples:
            groups.append(answers)
    return groups


def answer_text(tokenizer: Tokenizer, token_ids: Sequence[int], eos: int) -> str:
    """The text of an answer with its tags, without the end token."""
    ended = bool(token_ids) and token_ids[-1] == eos
    text: str = tokenizer.decode(token_ids[:-1] if ended else list(token_ids), skip_special_tokens=False)
    return text


def check_weight_version(groups: Sequence[Sequence[Answer]], version: int) -> None:
    """Check that the learner's current weights sampled every answer.

    Raises:
        StageFailed: other weights sampled an answer: the engine did not take an update.
    """
    others = {answer.version for group in groups for answer in group} - {version}
    if others:
        raise StageFailed(f"the learner has weights {version}, but weights {min(others)} sampled an answer")
