"""Sends problems to a served model through the OpenAI API, many at a time, and grades the answers."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from openai import AsyncOpenAI, BadRequestError

from components.core.base.errors import DataError
from components.core.text.chat import END_THINK, THINK, format_ok, parse_answer, system_message
from components.core.text.formulas import JudgeFailed
from components.core.text.problems import Problem
from components.core.text.verifier import verify
from components.eval.answers import AnswerRow, PromptMode
from components.eval.config import EvalConfig

SERVED_NAME = "model"
TIMEOUT_S = 600.0


async def ask(
    url: str,
    model: str,
    problems: Sequence[Problem],
    modes: Sequence[PromptMode],
    config: EvalConfig,
    on_answer: Callable[[], None],
) -> list[AnswerRow]:
    """Ask a model every problem in every mode. All requests run concurrently, so that the server's batch stays full.

    Args:
        url: base URL of the server.
        model: role of the served model.
        problems: the problems.
        modes: prompt modes of the model.
        config: sampling, limits and seed.
        on_answer: called when a problem has its answers; an exception from it cancels the rest.

    Returns:
        The answers to all problems in the first mode, then in the next.

    Raises:
        DataError: a problem is too long for the model.
        openai.APIError: the server failed, or went away.
    """
    slots = asyncio.Semaphore(config.concurrency)
    async with AsyncOpenAI(base_url=url, api_key="-", timeout=TIMEOUT_S, max_retries=1) as client:

        async def ask_one(problem: Problem, mode: PromptMode) -> AnswerRow:
            async with slots:
                try:
                    samples = await (_complete if mode == "plain" else _chat)(client, problem, mode, config)
                except BadRequestError as error:
                    raise DataError(
                        f"problem {problem.id} of test-{problem.split} cannot be asked: {error.message}",
                        hint="shorten it, leave it out, or lower eval.max_tokens",
                    ) from None
            on_answer()
            return await asyncio.to_thread(grade, model, problem, mode, samples)

        return list(await asyncio.gather(*(ask_one(problem, mode) for mode in modes for problem in problems)))


def num_samples(config: EvalConfig, mode: PromptMode) -> int:
    """Number of answers per problem: one if they are greedy, because those are all the same."""
    return config.num_samples if mode == "on" and config.temperature > 0 else 1


async def _complete(client: AsyncOpenAI, problem: Problem, mode: PromptMode, config: EvalConfig) -> list[str]:
    """A greedy completion of the plain prompt."""
    reply = await client.completions.create(
        model=SERVED_NAME,
        prompt=problem.prompt,
        max_tokens=config.max_tokens,
        temperature=0,
        extra_body={"add_special_tokens": False},  # as in training
    )
    return [choice.text for choice in reply.choices]


async def _chat(client: AsyncOpenAI, problem: Problem, mode: PromptMode, config: EvalConfig) -> list[str]:
    """Sampled replies with thinking on, a greedy one with thinking off."""
    on = mode == "on"
    samples = num_samples(config, mode)
    reply = await client.chat.completions.create(
        model=SERVED_NAME,
        messages=[system_message(mode), {"role": "user", "content": problem.question}],  # type: ignore[list-item]
        max_tokens=config.max_tokens,
        temperature=config.temperature if on else 0,
        top_p=config.top_p if on else 1,
        n=samples,
        seed=((config.seed or 0) * 1_000_003 + problem.number) * samples,  # sample i uses seed + i
    )
    return [joined(_reasoning(choice.message), choice.message.content or "") for choice in reply.choices]


def grade(model: str, problem: Problem, mode: PromptMode, samples: Sequence[str]) -> AnswerRow:
    """The answers, with whether each is correct and has its format, or why that cannot be decided."""
    base = mode == "plain"
    correct: tuple[bool, ...] = ()
    judge_error = None

    def is_correct(text: str) -> bool:
        return problem.is_completed_by(text) if base else verify(parse_answer(text)[1], problem.answer)

    try:
        correct = tuple(map(is_correct, samples))
    except JudgeFailed as error:
        judge_error = str(error)
    return AnswerRow(
        model=model,
        split=problem.split,
        mode=mode,
        id=problem.id,
        question=problem.question,
        expected=problem.answer,
        samples=tuple(samples),
        correct=correct,
        format_ok=None if base else tuple(format_ok(text, mode) for text in samples),
        judge_error=judge_error,
    )


def joined(reasoning: str, content: str) -> str:
    """A reply as one text: the reasoning between its tags, then the answer."""
    return f"{THINK}{reasoning}{END_THINK}{content}" if reasoning else content


def _reasoning(message: Any) -> str:
    """The field `reasoning`, which vLLM adds to OpenAI's message."""
    return str((message.model_extra or {}).get("reasoning") or "")
