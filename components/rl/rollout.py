"""Rollouts: vLLM samples answers, a verifier judges them. Source: arXiv 2505.00949, section 5.1."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from components.core.base.errors import StageFailed
from components.core.serving.engine import Engine
from components.core.text.chat import format_ok, parse_answer
from components.core.text.verifier import verify

ACCURACY_REWARD, FORMAT_REWARD = 1.0, 0.2
"""Rewards of a right answer and of the format of the mode; the paper adds the two and does not say their weights."""

Judge = Callable[[str, str], bool]
"""Function from answer and expected answer to whether it is right. If it raises, the answer counts as not judged."""


@dataclass(frozen=True)
class Reward:
    """The reward of one answer.

    Attributes:
        total: the sum that GRPO uses.
        correct: whether the answer is right.
        format_ok: whether it has the format of its mode.
    """

    total: float
    correct: bool
    format_ok: bool


class Environment:
    """Scores answers. A problem whose judge fails is put in quarantine; its answers are not scored as 0."""

    def __init__(self, judge: Judge = verify) -> None:
        self._judge = judge
        self.quarantine: dict[str, str] = {}
        """For the id of each problem in quarantine, the error of its judge."""

    def score(self, problem_id: str, text: str, expected: str, mode: str) -> Reward | None:
        """Reward of one answer; None if the judge failed on this problem, now or before.

        Only an answer with the right format earns for accuracy.
        """
        if problem_id in self.quarantine:
            return None
        in_format = format_ok(text, mode)
        _, answer = parse_answer(text)
        try:
            correct = self._judge(answer, expected)
        except Exception as error:
            self.quarantine[problem_id] = f"{type(error).__name__}: {error}"
            return None
        return Reward(ACCURACY_REWARD * (correct and in_format) + FORMAT_REWARD * in_format, correct, in_format)


@dataclass(frozen=True)
class Problem:
    """A problem, with its prompt in one mode."""

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
    """Log-probability of each token under the distribution that the engine sampled it from, nats."""
    version: int
    """Version of those weights."""
    truncated: bool
    """Whether the answer was cut off at the maximum length."""
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

    Each request has a seed of its own, so that equal weights give equal answers, also in another process.

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
                truncated, logprobs = sample.finish_reason == "length", sample.logprobs or ()
                answers.append(Answer(problem, sample.token_ids, logprobs, sample.weight_version, truncated, reward))
        if len(answers) == samples:
            groups.append(answers)
    return groups


def answer_text(tokenizer: Tokenizer, token_ids: Sequence[int], eos: int) -> str:
    """The text of an answer: with its tags, without the end token."""
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
