"""The smoke test: questions to a running server, answered in one piece and streamed."""

from typing import Any

from openai import OpenAI

from components.core.base.errors import StageFailed
from components.core.text.chat import END_THINK, THINK, Mode, system_message

SERVED_NAME = "model"
TIMEOUT_S = 120.0


def converse(url: str, question: str, mode: Mode, max_tokens: int) -> dict[str, Any]:
    """Ask one question in one mode, greedily: once for the complete reply, once streamed.

    Returns:
        `question` and `mode`; `reasoning` and `answer` of the complete reply; `streamed`: the same two, joined from the
        deltas; `same_when_streamed`; `format_ok`: with thinking on, reasoning and an answer; with thinking off, an
        answer alone.

    Raises:
        StageFailed: the stream contains a tag as text that the complete reply does not contain.
    """
    with OpenAI(base_url=url, api_key="-", timeout=TIMEOUT_S) as client:
        request: dict[str, Any] = {
            "model": SERVED_NAME,
            "messages": [system_message(mode), {"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        complete = _fields(client.chat.completions.create(**request).choices[0].message)
        streamed = {"reasoning": "", "answer": ""}
        for chunk in client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                for name, text in _fields(choice.delta).items():
                    streamed[name] += text
    for tag in (THINK, END_THINK):
        if tag in "".join(streamed.values()) and tag not in "".join(complete.values()):
            raise StageFailed(f"the server streams {tag} as text: {streamed} instead of {complete}")
    return {
        "question": question,
        "mode": mode,
        **complete,
        "streamed": streamed,
        "same_when_streamed": complete == streamed,
        "format_ok": bool(complete["answer"].strip()) and bool(complete["reasoning"].strip()) == (mode == "on"),
    }


def _fields(message: Any) -> dict[str, str]:
    """Reasoning and answer of a message or delta. The field `reasoning` is vLLM's addition to OpenAI's types."""
    reasoning = (message.model_extra or {}).get("reasoning")
    return {"reasoning": str(reasoning or ""), "answer": message.content or ""}
