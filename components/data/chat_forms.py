"""Reads the forms in which people have chats: messages, ShareGPT, Alpaca, Llama-Nemotron, prompt and response."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from components.core.text.chat import check_turns, format_ok
from components.core.text.row_files import Row
from components.core.text.toggle import END_THINK, THINK, system_message

TOGGLE = re.compile(r"\s*detailed thinking (on|off)\b\s*")
MESSAGE_KEYS = ("messages", "conversations", "conversation")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys beside the content of an answer, or beside the output of a row, that hold its thought."""
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ANSWER_KEYS = {"instruction": ("output", "response"), "input": ("output",), "prompt": ("completion", "response")}
"""Keys of the answer, for each key of the question."""


def chat_row(row: Row) -> Row:
    """A chat {messages, reasoning} of any form.

    Several system messages at the start become one.

    Raises:
        ValueError: turns out of order, no question, no answer, or a reasoning mode that the text contradicts.
    """
    messages = _messages(row)
    start = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    system, turns = [message["content"] for message in messages[:start]], messages[start:]
    check_turns(turns)
    for message in turns:
        if not message["content"].strip():
            raise ValueError("empty question" if message["role"] == "user" else "empty answer")
    mode = _mode(row, system, turns[-1]["content"])
    extra = "\n".join(text for content in system if (text := TOGGLE.sub("", content, count=1).strip()))
    first = system_message(mode)
    if extra:
        first = {**first, "content": f"{first['content']}\n{extra}"}
    return {"messages": [first, *turns], "reasoning": mode}


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Messages with role and text; a thought stands between its tags before the text."""
    key = next((name for name in MESSAGE_KEYS if name in row), None)
    messages = row[key] if key else _question_and_answer(row)
    if not isinstance(messages, list):
        raise ValueError("the messages are not a list")
    system = row.get("system") if key else None
    before: list[Any] = [{"role": "system", "content": system}] if system else []
    return [_message(number, message) for number, message in enumerate([*before, *messages], 1)]


def _message(number: int, message: Any) -> dict[str, str]:
    """One message, also of ShareGPT's form {from, value}."""
    if isinstance(message, dict) and "from" in message and "role" not in message:
        message = {**message, "role": message["from"], "content": message.get("value")}
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise ValueError(f"message {number} has no role and text")
    role, content = str(message["role"]), str(message["content"])
    role = SHAREGPT_ROLES.get(role, role)
    return {"role": role, "content": _with_thought(message, content) if role == "assistant" else content}


def _with_thought(holder: Mapping[str, Any], content: str) -> str:
    """An answer with the thought that stands in a key of its own."""
    thoughts = [
        text
        for key in THOUGHT_KEYS
        if isinstance(text := holder.get(key), str) and text.strip() not in ("", "on", "off")
    ]
    if not thoughts or THINK in content:
        return content
    return f"{THINK}{thoughts[0]}{END_THINK}{content}"


def _question_and_answer(row: Mapping[str, Any]) -> Any:
    """Messages of a row that has a question and an answer."""
    key = next((name for name in ANSWER_KEYS if name in row), None)
    if key is None:
        raise ValueError(
            f"keys {', '.join(map(str, row))[:80]} are of no known form: give messages, conversations, "
            "instruction and output, input and output, or prompt and completion"
        )
    asked, answer_key = row[key], next((name for name in ANSWER_KEYS[key] if name in row), ANSWER_KEYS[key][0])
    if key == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        asked = f"{asked}\n\n{row['input']}"
    answer = row[answer_key]
    if isinstance(asked, str):
        asked = [*_earlier_turns(row), {"role": "user", "content": asked}]
    if not isinstance(asked, list):
        return None
    prompt = row.get("system_prompt") or row.get("system")
    before = [{"role": "system", "content": prompt}] if prompt else []
    if isinstance(answer, str):
        thoughts = {name: row[name] for name in THOUGHT_KEYS if name in row}
        answer = [{"role": "assistant", "content": answer, **thoughts}]
    return [*before, *asked, *(answer if isinstance(answer, list) else [None])]


def _earlier_turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Alpaca's `history`, pairs of a question and an answer."""
    pairs = row.get("history") or ()
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _mode(row: Mapping[str, Any], system: Sequence[str], answer: str) -> str:
    """`on` or `off`: from the row or its system message, else by whether the answer has thinking tags."""
    stated = [found[1] for text in system if (found := TOGGLE.match(text))]
    reasoning = row.get("reasoning")
    if reasoning is not None and not (isinstance(reasoning, str) and THINK + reasoning + END_THINK in answer):
        stated.append(reasoning)
    if any(mode not in ("on", "off") for mode in stated):
        raise ValueError(f"reasoning={str(reasoning)[:20]!r} is neither on nor off")
    if len(set(stated)) > 1:
        raise ValueError(f"the system message says {stated[0]}, and reasoning {stated[-1]}")
    mode = str(stated[0]) if stated else "on" if THINK in answer else "off"
    if not format_ok(answer, mode):
        form = f"{THINK}…{END_THINK} and an answer" if mode == "on" else "an answer without thinking tags"
        raise ValueError(f"reasoning is {mode}, but the answer is not {form}")
    return mode
