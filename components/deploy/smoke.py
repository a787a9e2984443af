"""A smoke test: speak to a running server in both modes, whole and streamed."""

from typing import Any

from openai import OpenAI

from components.core.base.errors import StageFailed
from components.core.text.chat import END_THINK, THINK, Mode, system_message

SERVED_NAME = "model"
TIMEOUT_S = 120.0


def converse(url: str, question: str, mode: Mode, max_tokens: int) -> dict[str, Any]:
    """Ask one question in one mode, once whole and once streamed, greedily.

    Returns:
        `question` and `mode`; `reasoning` and `answer` of the whole reply; `streamed`: the same two, put together from
        the pieces; `same_when_streamed`; `kept_format`: reasoning and an answer, or with thinking off an answer alone.

    Raises:
        StageFailed: a tag came through in the pieces that the whole reply does not have.
    """
    with OpenAI(base_url=url, api_key="-", timeout=TIMEOUT_S) as client:
        request: dict[str, Any] = {
            "model": SERVED_NAME,
            "messages": [system_message(mode), {"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        whole = _fields(client.chat.completions.create(**request).choices[0].message)
        streamed = {"reasoning": "", "answer": ""}
        for piece in client.chat.completions.create(**request, stream=True):
            for choice in piece.choices:
                for name, text in _fields(choice.delta).items():
                    streamed[name] += text
    for tag in (THINK, END_THINK):
        if tag in "".join(streamed.values()) and tag not in "".join(whole.values()):
            raise StageFailed(f"the server streams {tag} as text: {streamed} instead of {whole}")
    return {
        "question": question,
        "mode": mode,
        **whole,
        "streamed": streamed,
        "same_when_streamed": whole == streamed,
        "kept_format": bool(whole["answer"].strip()) and bool(whole["reasoning"].strip()) == (mode == "on"),
    }


def _fields(message: Any) -> dict[str, str]:
    """Reasoning and answer of a message, or of a piece of one; OpenAI's own types do not know the first."""
    reasoning = (message.model_extra or {}).get("reasoning")
    return {"reasoning": str(reasoning or ""), "answer": message.content or ""}
