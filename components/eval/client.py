"""Sends problems to a served model through the OpenAI API, many at a time, and grades the answers."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, BadRequestError

from components.core.base.errors import DataError
from components.core.text.chat import format_ok, parse_answer
from components.core.text.judges.worker_pool import JudgeFailed
from components.core.text.problems import Problem
from components.core.text.toggle import END_THINK, THINK, system_message
from components.core.text.tokenizer import plain_prompt_ids
from components.eval.answer_rows import AnswerRow, PromptMode
from components.eval.config import EvalConfig

SERVED_NAME = "model"
TIMEOUT_S = 600.0


STOP = ["\nQuestion:", "\nQ:", "\nProblem:"]
"""Where the completion of a base model ends: it goes on with the next question that it makes up."""


async def ask(
    url: str,
    model: str,
    requests: Sequence[tuple[Problem, PromptMode]],
    config: EvalConfig,
    on_answer: Callable[[], None],
    folder: Path,
) -> list[AnswerRow]:
    """Ask a model problems. All requests run concurrently, so that the server's batch stays full.

    Args:
        url: base URL of the server.
        model: role of the served model.
        requests: each problem with the mode to ask it in.
        config: sampling, limits and seed.
        on_answer: called when a problem has its answers; an exception from it cancels the rest.
        folder: the model's, whose tokenizer encodes plain prompts.

    Returns:
        The answers in the order of the requests.

    Raises:
        DataError: a problem is too long for the model.
        openai.APIError: the server failed, or went away.
    """
    slots = asyncio.Semaphore(config.concurrency)
    plain = [problem for problem, mode in requests if mode == "plain"]
    prompts = dict(zip(plain, plain_prompt_ids(folder, [each.prompt for each in plain]) if plain else (), strict=True))
    async with AsyncOpenAI(base_url=url, api_key="-", timeout=TIMEOUT_S, max_retries=1) as client:

        async def ask_one(problem: Problem, mode: PromptMode) -> AnswerRow:
            async with slots:
                try:
                    if mode == "plain":
                        samples = await _complete(client, prompts[problem], _sampling(problem, mode, config))
                    else:
                        samples = await _chat(client, problem, mode, _sampling(problem, mode, config))
                except BadRequestError as error:
                    raise DataError(
                        f"problem {problem.id} of test-{problem.split} cannot be asked: {error.message}",
                        hint="shorten it, leave it out, or lower eval.max_tokens",
                    ) from None
            on_answer()
            return await asyncio.to_thread(grade, model, problem, mode, samples)

        return list(await asyncio.gather(*(ask_one(problem, mode) for problem, mode in requests)))


def num_samples(config: EvalConfig, mode: PromptMode) -> int:
    """Number of answers per problem: one if they are greedy, because those are all the same."""
    return config.num_samples if mode != "off" and config.temperature > 0 else 1


def _sampling(problem: Problem, mode: PromptMode, config: EvalConfig) -> dict[str, Any]:
    """Sampling settings of a request; every model has the same, and with thinking off the answer is greedy."""
    samples, sampled = num_samples(config, mode), mode != "off"
    return {
        "max_tokens": config.max_tokens,
        "temperature": config.temperature if sampled else 0,
        "top_p": config.top_p if sampled else 1,
        "n": samples,
        "seed": ((config.seed or 0) * 1_000_003 + problem.number) * samples,  # sample i uses seed + i
    }


async def _complete(client: AsyncOpenAI, prompt: list[int], sampling: dict[str, Any]) -> list[str]:
    """Completions of a plain prompt, tokenized as documents are in training."""
    reply = await client.completions.create(model=SERVED_NAME, prompt=prompt, stop=STOP, **sampling)
    return [choice.text for choice in reply.choices]


async def _chat(client: AsyncOpenAI, problem: Problem, mode: PromptMode, sampling: dict[str, Any]) -> list[str]:
    """Replies in a chat; a model without the switch gets the question alone."""
    switch = [] if mode == "chat" else [system_message(mode)]
    reply = await client.chat.completions.create(
        model=SERVED_NAME,
        messages=[*switch, {"role": "user", "content": problem.question}],  # type: ignore[list-item]
        **sampling,
    )
    return [joined(_reasoning(choice.message), choice.message.content or "") for choice in reply.choices]


def grade(model: str, problem: Problem, mode: PromptMode, samples: Sequence[str]) -> AnswerRow:
    """The answers with their scores, and whether each is correct and has its format, or why that cannot be decided."""
    without_switch = mode in ("chat", "plain")
    found: tuple[float, ...] = ()
    judge_error = None

    def score(text: str) -> float:
        answer = parse_answer(text)[1]
        return problem.score_completion(answer) if without_switch else problem.score(answer)

    try:
        found = tuple(map(score, samples))
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
        correct=tuple(value == 1 for value in found),
        scores=None if problem.verifier is None else found,
        format_ok=None if without_switch else tuple(format_ok(text, mode) for text in samples),
        judge_error=judge_error,
    )


def joined(reasoning: str, content: str) -> str:
    """A reply as one text: the reasoning between its tags, then the answer."""
    return f"{THINK}{reasoning}{END_THINK}{content}" if reasoning else content


def _reasoning(message: Any) -> str:
    """The field `reasoning`, which vLLM adds to OpenAI's message."""
    return str((message.model_extra or {}).get("reasoning") or "")
