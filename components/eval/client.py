"""Asks a served model some problems, many at a time, through the OpenAI API."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from openai import AsyncOpenAI, BadRequestError

from components.core.base.errors import DataError
from components.core.text.chat import END_THINK, THINK, format_ok, parse_answer, system_message
from components.core.text.problems import Problem
from components.core.text.verifier import verify
from components.eval.answers import Answered, PromptMode
from components.eval.config import EvalConfig

SERVED_NAME = "model"
TIMEOUT_S = 600.0


async def ask(
    url: str,
    model: str,
    problems: Sequence[Problem],
    ways: Sequence[PromptMode],
    config: EvalConfig,
    on_answer: Callable[[], None],
) -> list[Answered]:
    """Ask a model every problem in every way, all in one go, so that the server's batch stays full.

    Args:
        url: base URL of the server.
        model: role of the model that it serves.
        problems: what is asked.
        ways: how; the answers come way by way, in the order of the problems.
        config: sampling, limits and seed.
        on_answer: called when a problem has its answers; what it raises ends the asking.

    Raises:
        DataError: a problem is too long for the model.
        openai.APIError: the server failed, or went away.
    """
    room = asyncio.Semaphore(config.concurrency)
    async with AsyncOpenAI(base_url=url, api_key="-", timeout=TIMEOUT_S, max_retries=1) as client:

        async def one(problem: Problem, way: PromptMode) -> Answered:
            async with room:
                try:
                    samples = await (_complete if way == "plain" else _chat)(client, problem, way, config)
                except BadRequestError as error:
                    raise DataError(
                        f"problem {problem.id} of test-{problem.split} cannot be asked: {error.message}",
                        hint="shorten it, leave it out, or lower eval.max_tokens",
                    ) from None
            on_answer()
            return grade(model, problem, way, samples)

        return list(await asyncio.gather(*(one(problem, way) for way in ways for problem in problems)))


def num_samples(config: EvalConfig, way: PromptMode) -> int:
    """Answers to each problem: greedy ones are all the same, so there is one."""
    return config.num_samples if way == "on" and config.temperature > 0 else 1


async def _complete(client: AsyncOpenAI, problem: Problem, way: PromptMode, config: EvalConfig) -> list[str]:
    """A greedy completion of the plain prompt."""
    reply = await client.completions.create(
        model=SERVED_NAME,
        prompt=problem.prompt,
        max_tokens=config.max_tokens,
        temperature=0,
        extra_body={"add_special_tokens": False},  # as in training
    )
    return [choice.text for choice in reply.choices]


async def _chat(client: AsyncOpenAI, problem: Problem, way: PromptMode, config: EvalConfig) -> list[str]:
    """Sampled replies with thinking on, a greedy one with thinking off."""
    on = way == "on"
    samples = num_samples(config, way)
    reply = await client.chat.completions.create(
        model=SERVED_NAME,
        messages=[system_message(way), {"role": "user", "content": problem.question}],  # type: ignore[list-item]
        max_tokens=config.max_tokens,
        temperature=config.temperature if on else 0,
        top_p=config.top_p if on else 1,
        n=samples,
        seed=((config.seed or 0) * 1_000_003 + problem.number) * samples,  # sample i takes seed + i
    )
    return [joined(_reasoning(choice.message), choice.message.content or "") for choice in reply.choices]


def grade(model: str, problem: Problem, way: PromptMode, samples: Sequence[str]) -> Answered:
    """Which answers are right, and which keep their format."""
    base = way == "plain"

    def is_right(text: str) -> bool:
        return problem.is_completed_by(text) if base else verify(parse_answer(text)[1], problem.answer)

    return Answered(
        model=model,
        split=problem.split,
        mode=way,
        id=problem.id,
        question=problem.question,
        expected=problem.answer,
        samples=tuple(samples),
        correct=tuple(map(is_right, samples)),
        kept_format=None if base else tuple(format_ok(text, way) for text in samples),
    )


def joined(reasoning: str, content: str) -> str:
    """A reply as one text: reasoning between its tags, then the answer."""
    return f"{THINK}{reasoning}{END_THINK}{content}" if reasoning else content


def _reasoning(message: Any) -> str:
    """A field that OpenAI's own types do not know."""
    return str((message.model_extra or {}).get("reasoning") or "")
