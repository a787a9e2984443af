"""Asks a served model a set of problems, many at a time, through the OpenAI API."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openai import AsyncOpenAI

from components.core.chat import END_THINK, THINK, plain_answer, system_message
from components.core.verifier import verify
from components.eval.config import EvalConfig

Way = Literal["on", "off", "plain"]
"""Thinking on, thinking off, or a base model's own way: a completion of the plain prompt."""

SERVED_NAME = "model"


@dataclass(frozen=True)
class Answered:
    """All answers to one problem in one way."""

    id: str
    expected: str
    texts: tuple[str, ...]
    right: tuple[bool, ...]
    kept_format: tuple[bool, ...] | None
    """None for a base model, which has no format to keep."""


def ask_all(
    url: str, rows: Sequence[Mapping[str, Any]], way: Way, config: EvalConfig, on_answer: Callable[[], None]
) -> list[Answered]:
    """Ask every problem in one way; `on_answer` is called after each."""
    return asyncio.run(_ask_all(url, rows, way, config, on_answer))


def num_samples(config: EvalConfig, way: Way) -> int:
    """Answers to each problem: greedy ones are all the same, so there is one."""
    return config.num_samples if way == "on" and config.temperature > 0 else 1


async def _ask_all(
    url: str, rows: Sequence[Mapping[str, Any]], way: Way, config: EvalConfig, on_answer: Callable[[], None]
) -> list[Answered]:
    samples = num_samples(config, way)
    room = asyncio.Semaphore(max(1, config.concurrency // samples))
    async with AsyncOpenAI(base_url=url, api_key="-", timeout=600, max_retries=1) as client:

        async def one(number: int, row: Mapping[str, Any]) -> Answered:
            async with room:
                seed = (config.seed or 0) * 1_000_003 + number * 101
                answered = await (_plain if way == "plain" else _chat)(client, row, way, config, samples, seed)
            on_answer()
            return answered

        return list(await asyncio.gather(*(one(number, row) for number, row in enumerate(rows))))


async def _plain(
    client: AsyncOpenAI, row: Mapping[str, Any], way: Way, config: EvalConfig, samples: int, seed: int
) -> Answered:
    """A greedy completion of the plain prompt."""
    reply = await client.completions.create(
        model=SERVED_NAME,
        prompt=row["prompt"],
        max_tokens=config.max_tokens,
        temperature=0,
        extra_body={"add_special_tokens": False},
    )
    texts = tuple(choice.text for choice in reply.choices)
    right = tuple(verify(plain_answer(text), row["answer"]) for text in texts)
    return Answered(row["id"], row["answer"], texts, right, None)


async def _chat(
    client: AsyncOpenAI, row: Mapping[str, Any], way: Way, config: EvalConfig, samples: int, seed: int
) -> Answered:
    """Sampled answers with thinking on, a greedy one with thinking off."""
    on = way == "on"
    reply = await client.chat.completions.create(
        model=SERVED_NAME,
        messages=[system_message(way), {"role": "user", "content": row["question"]}],  # type: ignore[list-item]
        max_tokens=config.max_tokens,
        temperature=config.temperature if on else 0,
        top_p=config.top_p if on else 1,
        n=samples,
        seed=seed,
    )
    texts, right, kept = [], [], []
    for choice in reply.choices:
        reasoning, content = reasoning_of(choice.message), choice.message.content or ""
        texts.append(f"{THINK}{reasoning}{END_THINK}{content}" if reasoning else content)
        kept.append(keeps_format(reasoning, content, way))
        right.append(verify(content, row["answer"]))
    return Answered(row["id"], row["answer"], tuple(texts), tuple(right), tuple(kept))


def reasoning_of(message: Any) -> str:
    """The reasoning field of a chat message; OpenAI's own types do not know it."""
    extra = message.model_extra or {}
    return str(extra.get("reasoning") or extra.get("reasoning_content") or "")


def keeps_format(reasoning: str, content: str, way: Way) -> bool:
    """On: some reasoning, then an answer without tags. Off: an answer without tags, and no reasoning."""
    clean = bool(content.strip()) and THINK not in content and END_THINK not in content
    return clean and bool(reasoning.strip()) == (way == "on")
