"""Rollouts: vLLM samples answers, a verifier judges them. Source: arXiv 2505.00949, section 5.1."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer

from components.core.base.errors import StageFailed
from components.core.serving.engine import Engine, Sample
from components.core.text.chat import format_ok, parse_answer
from components.core.text.judges.reasoning_tasks import Verifier
from components.core.text.problems import score_answer
from components.rl.config import RlConfig

ACCURACY_REWARD, FORMAT_REWARD = 1.0, 0.2
"""Rewards of a right answer and of the format of the mode; the paper adds the two and does not say their weights."""

Judge = Callable[[str, str, Verifier | None], float]
"""Function from answer, expected answer and the problem's verifier to a score from 0 to 1, where 1 is right. If it
raises, the answer counts as not judged."""


@dataclass(frozen=True)
class Reward:
    """The reward of one answer.

    Attributes:
        total: the sum that GRPO uses; a score below 1 earns that part of the reward for accuracy.
        correct: whether the answer is right, with a score of 1.
        format_ok: whether it has the format of its mode.
    """

    total: float
    correct: bool
    format_ok: bool


class Environment:
    """Scores answers. A problem whose judge fails is put in quarantine; its answers are not scored as 0."""

    def __init__(self, judge: Judge = score_answer) -> None:
        self._judge = judge
        self.quarantine: dict[str, str] = {}
        """For the id of each problem in quarantine, the error of its judge."""

    def score(
        self, problem_id: str, text: str, expected: str, mode: str, verifier: Verifier | None = None
    ) -> Reward | None:
        """Reward of one answer; None if the judge failed on this problem, now or before.

        Only an answer with the right format earns for accuracy.
        """
        if problem_id in self.quarantine:
            return None
        in_format = format_ok(text, mode)
        _, answer = parse_answer(text)
        try:
            score = self._judge(answer, expected, verifier)
        except Exception as error:
            self.quarantine[problem_id] = f"{type(error).__name__}: {error}"
            return None
        return Reward(ACCURACY_REWARD * score * in_format + FORMAT_REWARD * in_format, score == 1, in_format)


@dataclass(frozen=True)
class Problem:
    """A problem, with its prompt in one mode."""

    id: str
    prompt_ids: list[int]
    expected: str
    mode: str
    verifier: Verifier | None = None
    """Scores answers; None: an answer is right where it equals `expected`."""


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


@dataclass
class Sampler:
    """Samples answers with the engine's current weights, and scores them while it generates others.

    Threads score; the verifier compares formulas in processes of its own.

    Attributes:
        engine: with the policy's weights.
        tokenizer: of the policy.
        eos: the token that ends an answer.
        config: sampling, and the length that is rewarded.
        environment: judges.
    """

    engine: Engine
    tokenizer: Tokenizer
    eos: int
    config: RlConfig
    environment: Environment = field(default_factory=Environment)

    def sample(
        self,
        problems: Sequence[Problem],
        *,
        seed: int,
        samples: int,
        on_finished: Callable[[int], None] = lambda number: None,
    ) -> list[list[Answer]]:
        """Sample a group of answers to each problem, and score them.

        Each request has a seed of its own, so that equal weights give equal answers, also in another process.

        Args:
            problems: with their prompts.
            seed: of this call.
            samples: answers to each problem.
            on_finished: receives the number of problems whose answers were sampled, each time one more is.

        Returns:
            One list per problem, without the problems whose scoring failed.
        """
        finished = self.engine.generate(
            [problem.prompt_ids for problem in problems],
            n=samples,
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
            seeds=[(seed * 1_000_003 + number * 1009) % (1 << 31) for number in range(len(problems))],
            stop_token_ids=[self.eos],
            logprobs=True,
        )
        scores: dict[int, Future[list[Answer] | None]] = {}
        with ThreadPoolExecutor(os.cpu_count()) as judges:
            for number, group in finished:
                scores[number] = judges.submit(self._scored, problems[number], group)
                on_finished(len(scores))
        groups = (scores[number].result() for number in range(len(problems)))
        return [group for group in groups if group is not None]

    def _scored(self, problem: Problem, group: Sequence[Sample]) -> list[Answer] | None:
        """The answers with their rewards; None if the judge failed on one of them."""
        answers = []
        for sample in group:
            text = answer_text(self.tokenizer, sample.token_ids, self.eos)
            reward = self.environment.score(problem.id, text, problem.expected, problem.mode, problem.verifier)
            if reward is None:
                return None
            penalty = overlong_penalty(len(sample.token_ids), self.config.max_tokens, self.config.overlong_buffer)
            reward = replace(reward, total=reward.total - penalty)
            truncated, logprobs = sample.finish_reason == "length", sample.logprobs or ()
            answers.append(Answer(problem, sample.token_ids, logprobs, sample.weight_version, truncated, reward))
        return answers


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """What an answer loses for its length: 0 up to `buffer` tokens below the maximum, 1 at the maximum, linear between.

    Source: arXiv 2503.14476, equation 13.
    """
    return max(0, length - (max_tokens - buffer)) / buffer if buffer else 0.0


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
