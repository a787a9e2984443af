"""A user's own files: text and JSONL to the rows that the stages read."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from components.core.chat import END_THINK, THINK, system_message
from components.core.errors import DataError
from components.core.rows import Row, read_user_rows

TOGGLE = "detailed thinking "


def corpus_rows(folder: Path, *, skip_bad: bool) -> tuple[list[Row], int]:
    """Rows {text} or {prompt, completion}, one a text file or JSONL line. Also returns how many lines were left out.

    Raises:
        DataError: malformed lines, or no text at all.
    """
    files = _files(folder)
    tables = [path for path in files if path.suffix == ".jsonl"]
    rows, skipped = read_user_rows(tables, _corpus_row, skip_bad=skip_bad)
    for path in files:
        if path.suffix != ".jsonl":
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                rows.append({"text": text})
    if not rows:
        raise DataError("the corpus holds no text", hint="give text files, or JSONL with rows {text}")
    return rows, skipped


def chat_rows(folder: Path, *, skip_bad: bool) -> tuple[list[Row], int]:
    """Rows {messages, reasoning}; the first message is the toggle. Also returns how many lines were left out."""
    return read_user_rows(_files(folder), chat_row, skip_bad=skip_bad)


def problem_rows(folder: Path, *, skip_bad: bool) -> tuple[list[Row], int]:
    """Rows {id, question, prompt, answer, level}. Also returns how many lines were left out."""
    return read_user_rows(_files(folder), _problem_row, skip_bad=skip_bad)


def held_out(text: str, share: float) -> bool:
    """Whether a row belongs to the held-out share, by its hash: the same row always does."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number / 2**64 < share


def chat_row(row: Row) -> Row:
    """A chat, from {messages} or from a row of the Llama-Nemotron post-training data set.

    Raises:
        ValueError: no question, no answer, or a reasoning mode that the text contradicts.
    """
    messages = _messages(row)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not an answer of the assistant")
    if not messages[-1]["content"].strip():
        raise ValueError("empty answer")
    system = [m["content"] for m in messages if m["role"] == "system"]
    mode = _mode(row, system, messages[-1]["content"])
    extra = "\n".join(text for text in system if not text.strip().startswith(TOGGLE)).strip()
    first = system_message(mode)
    if extra:
        first = {**first, "content": f"{first['content']}\n{extra}"}
    return {"messages": [first, *(m for m in messages if m["role"] != "system")], "reasoning": mode}


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Messages with role and text."""
    if "messages" in row:
        messages = row["messages"]
    else:
        asked = row["input"]
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        if row.get("system_prompt"):
            messages.insert(0, {"role": "system", "content": row["system_prompt"]})
        messages.append({"role": "assistant", "content": row["output"]})
    if not isinstance(messages, list):
        raise ValueError("messages is not a list")
    for message in messages:
        if message["role"] not in ("system", "user", "assistant") or not isinstance(message["content"], str):
            raise ValueError(f"a message of role {message['role']!r} without text")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _mode(row: Mapping[str, Any], system: Iterable[str], answer: str) -> str:
    """On or off: as the row says, else as its system message says, else by whether the answer thinks."""
    thinks = answer.lstrip().startswith(THINK) and END_THINK in answer
    stated = row.get("reasoning")
    for text in system:
        if stated is None and text.strip().startswith(TOGGLE):
            stated = "off" if text.strip().startswith(TOGGLE + "off") else "on"
    if stated is None:
        return "on" if thinks else "off"
    if stated not in ("on", "off"):
        raise ValueError(f"reasoning={stated!r} is neither on nor off")
    if stated == "on" and not thinks:
        raise ValueError(f"reasoning is on, but the answer does not start with {THINK}…{END_THINK}")
    if stated == "off" and (THINK in answer or END_THINK in answer):
        raise ValueError("reasoning is off, but the answer has a thinking tag")
    return str(stated)


def _corpus_row(row: Row) -> Row:
    if "prompt" in row and "completion" in row:
        return {"prompt": _text(row, "prompt"), "completion": _text(row, "completion")}
    return {"text": _text(row, "text")}


def _problem_row(row: Row) -> Row:
    key = next((name for name in ("question", "problem", "prompt") if name in row), "question")
    question, answer = _text(row, key), row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError("answer is not a text or number")
    identity = str(row.get("id", hashlib.sha256(question.encode()).hexdigest()[:16]))
    level = row.get("level", 0)
    return {
        "id": identity,
        "question": question,
        "prompt": f"{question}\nAnswer:",
        "answer": str(answer),
        "level": level if isinstance(level, int) else 0,
    }


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is not a text")
    return value


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
