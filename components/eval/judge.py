"""Asks two versions of a served model the same questions, for the decision whether the new one gets users."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import APIError, AsyncOpenAI

from components.core.base.errors import InputError, TesseraError
from components.core.text.chat import Mode, format_ok
from components.core.text.problems import Problem
from components.core.text.toggle import system_message
from components.eval.answers import load_problems
from components.eval.client import grade, joined
from components.eval.paired_verdict import Finding, Pair, Reply, compare

MODES: tuple[Mode, ...] = ("on", "off")
LEAST_QUESTIONS = 200
"""With 50 questions, a version that failed one request in ten passed once."""
API_KEY = "VLLM_API_KEY"
"""Environment variable with the key of the servers, where they ask for one; vLLM reads it under the same name."""


def judge(
    urls: tuple[str, str],
    model: str,
    problems: Sequence[Problem],
    *,
    tolerance: float,
    max_tokens: int,
    concurrency: int,
    timeout_s: float,
) -> list[Finding]:
    """Ask both versions every question in both modes, and compare the answers.

    Sampling settings are the server's own, as for a client that sets none; each question has its seed.

    Args:
        urls: base URLs of the stable version and of the canary, with `/v1`.
        model: name of the model in requests.
        problems: the questions, with their answers.
        tolerance: fraction of answers by which the canary may be worse.
        max_tokens: longest answer.
        concurrency: questions that are asked at the same time.
        timeout_s: longest time of an answer; a later one counts as failed.

    Raises:
        TesseraError: the stable version answers nothing, so there is nothing to compare with.
    """
    limits = {"max_tokens": max_tokens, "timeout": timeout_s}
    pairs = asyncio.run(_ask_all(urls, model, problems, limits, concurrency))
    if all(reply.failed for stable, _ in pairs for reply in stable):
        raise TesseraError(
            f"the stable version at {urls[0]} answered none of {len(pairs)} questions",
            hint="mend it, or promote the new version by hand: kubectl argo rollouts promote --full",
        )
    return compare(pairs, tolerance)


def read_questions(folder: Path, number: int) -> list[Problem]:
    """The first questions of a folder with test problems, as many of each split as needed.

    Raises:
        InputError: there are too few, or too few are wanted.
    """
    if number < LEAST_QUESTIONS:
        raise InputError(
            f"{number} questions are too few to tell a version that fails one request in ten",
            hint=f"ask {LEAST_QUESTIONS} at least",
        )
    found = load_problems(folder, number)[:number]
    if len(found) < number:
        raise InputError(f"{folder} has {len(found)} questions, {number} are wanted", hint="take a larger data set")
    return found


async def _ask_all(
    urls: tuple[str, str], model: str, problems: Sequence[Problem], limits: dict[str, Any], concurrency: int
) -> list[Pair]:
    """The replies of both versions, which are asked a question at the same time."""
    slots = asyncio.Semaphore(concurrency)
    key = os.environ.get(API_KEY) or "-"
    async with (
        AsyncOpenAI(base_url=urls[0], api_key=key, max_retries=0) as stable,
        AsyncOpenAI(base_url=urls[1], api_key=key, max_retries=0) as canary,
    ):

        async def ask(problem: Problem) -> Pair:
            async with slots:
                requests = [_ask(each, model, problem, mode, limits) for each in (stable, canary) for mode in MODES]
                replies = await asyncio.gather(*requests)
            return replies[: len(MODES)], replies[len(MODES) :]

        return list(await asyncio.gather(*(ask(problem) for problem in problems)))


async def _ask(client: AsyncOpenAI, model: str, problem: Problem, mode: Mode, limits: dict[str, Any]) -> Reply:
    """The reply of one version to one question; an error of the server is a failed reply."""
    messages: Any = [system_message(mode), {"role": "user", "content": problem.question}]
    try:
        answer = await client.chat.completions.create(model=model, messages=messages, seed=problem.number, **limits)
    except APIError:
        return Reply(failed=True, correct=False)
    if not answer.choices:
        return Reply(failed=True, correct=False)
    (choice, *_) = answer.choices
    reasoning = str((choice.message.model_extra or {}).get("reasoning") or "")  # vLLM's addition to OpenAI's message
    text = joined(reasoning, choice.message.content or "")
    row = await asyncio.to_thread(grade, model, problem, mode, [text])
    return Reply(
        correct=row.correct[0] if row.correct else None,
        format_ok=format_ok(text, mode),
        cut_off=choice.finish_reason == "length",
        thinking=len(reasoning) if mode == "on" else None,
    )
