"""A smoke test: speak to a running server in both modes, whole and streamed."""

from typing import Any

from openai import OpenAI

from components.core.chat import system_message

SERVED_NAME = "model"


def converse(url: str, question: str, mode: str, max_tokens: int) -> dict[str, Any]:
    """Ask one question in one mode, once whole and once streamed, greedily.

    Returns:
        `reasoning` and `answer` of the whole reply, and `same_when_streamed`: whether the pieces add up to the same.
    """
    with OpenAI(base_url=url, api_key="-", timeout=120) as client:
        request: dict[str, Any] = {
            "model": SERVED_NAME,
            "messages": [system_message(mode), {"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        message = client.chat.completions.create(**request).choices[0].message
        whole = (_field(message, "reasoning"), message.content or "")
        reasoning = content = ""
        for piece in client.chat.completions.create(**request, stream=True):
            for choice in piece.choices:
                reasoning += _field(choice.delta, "reasoning")
                content += choice.delta.content or ""
    return {
        "question": question,
        "mode": mode,
        "reasoning": whole[0],
        "answer": whole[1],
        "same_when_streamed": whole == (reasoning, content),
    }


def _field(message: Any, name: str) -> str:
    """A field that OpenAI's own types do not know."""
    return str((message.model_extra or {}).get(name) or "")
