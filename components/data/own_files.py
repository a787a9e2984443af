"""Converts text and JSONL files of a user to the rows that the stages read."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.core.base.errors import DataError
from components.core.text.chat import END_THINK, THINK, check_turns, format_ok, system_message
from components.core.text.jsonl import Row, decode, first_few, read_user_rows

TOGGLE = re.compile(r"\s*detailed thinking (on|off)\b\s*")


def corpus_rows(folder: Path, *, skip_bad: bool) -> tuple[list[Row], int]:
    """Rows {text} or {prompt, completion}, one for each text file or JSONL line.

    Returns:
        The rows, and how many lines and files were skipped.

    Raises:
        DataError: malformed lines, binary files, or no text at all.
    """
    files = _files(folder)
    tables = [path for path in files if path.suffix.lower() == ".jsonl"]
    rows, skipped = read_user_rows(tables, _corpus_row, skip_bad=skip_bad)
    bad: list[str] = []
    for path in sorted(set(files).difference(tables)):
        try:
            text = decode(path.read_bytes())
        except ValueError as error:
            bad.append(f"{path.relative_to(folder)}: {error}")
        else:
            rows += [{"text": text}] if text.strip() else []
    if bad and not skip_bad:
        raise DataError(
            f"{len(bad)} files of the corpus are no text: {first_few(bad)}",
            hint="remove them, convert them to UTF-8, or leave them out with --skip-bad",
        )
    return _not_empty(rows, "the corpus holds no text", "text files, or JSONL with rows {text}"), skipped + len(bad)


def chat_rows(folder: Path, *, skip_bad: bool) -> tuple[list[Row], int]:
    """Rows {messages, reasoning}; the first message is the toggle. Also returns how many lines were skipped.

    Raises:
        DataError: malformed lines, or no chat at all.
    """
    rows, skipped = read_user_rows(_files(folder), chat_row, skip_bad=skip_bad)
    return _not_empty(rows, "there are no chats", "JSONL with rows {messages} or {input, output}"), skipped


def problem_rows(folder: Path, *, skip_bad: bool) -> tuple[list[Row], int]:
    """Rows {id, question, prompt, answer, level}. Also returns how many lines were skipped.

    Raises:
        DataError: malformed lines, or no problem at all.
    """
    rows, skipped = read_user_rows(_files(folder), _problem_row, skip_bad=skip_bad)
    return _not_empty(rows, "there are no problems", "JSONL with rows {question, answer}"), skipped


def chat_row(row: Row) -> Row:
    """A chat, from {messages} or from a row of the Llama-Nemotron post-training data set.

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


def questions(row: Row) -> list[str]:
    """Questions of a chat or a document: the user messages, the prompt, or else the text."""
    messages = row.get("messages")
    if isinstance(messages, list):
        return [message["content"] for message in messages if message["role"] == "user"]
    return [str(row["prompt"] if "prompt" in row else row["text"])]


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Messages with role and text."""
    if "messages" in row:
        messages = row["messages"]
    else:
        asked, prompt = row["input"], row.get("system_prompt")
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if isinstance(messages, list):
            before = [{"role": "system", "content": prompt}] if prompt else []
            messages = [*before, *messages, {"role": "assistant", "content": row["output"]}]
    if not isinstance(messages, list):
        raise ValueError("the messages are not a list")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"message {number} has no role and text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _mode(row: Mapping[str, Any], system: Sequence[str], answer: str) -> str:
    """`on` or `off`: from the row or its system message, else by whether the answer has thinking tags."""
    stated = [found[1] for text in system if (found := TOGGLE.match(text))]
    if row.get("reasoning") is not None:
        stated.append(row["reasoning"])
    if any(mode not in ("on", "off") for mode in stated):
        raise ValueError(f"reasoning={str(row['reasoning'])[:20]!r} is neither on nor off")
    if len(set(stated)) > 1:
        raise ValueError(f"the system message says {stated[0]}, and reasoning {stated[-1]}")
    mode = str(stated[0]) if stated else "on" if THINK in answer else "off"
    if not format_ok(answer, mode):
        form = f"{THINK}…{END_THINK} and an answer" if mode == "on" else "an answer without thinking tags"
        raise ValueError(f"reasoning is {mode}, but the answer is not {form}")
    return mode


def _corpus_row(row: Row) -> Row:
    if "prompt" in row and "completion" in row:
        return {"prompt": _text(row, "prompt"), "completion": _text(row, "completion")}
    return {"text": _text(row, "text")}


def _problem_row(row: Row) -> Row:
    key = next((name for name in ("question", "problem", "prompt") if name in row), "question")
    question, answer, identity = _text(row, key), row["answer"], row.get("id")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError("answer is not a text or number")
    return {
        "id": str(identity) if identity is not None else hashlib.sha256(question.encode()).hexdigest()[:16],
        "question": question,
        "prompt": f"{question}\nAnswer:",
        "answer": str(answer),
        "level": _level(row.get("level")),
    }


def _level(value: object) -> int:
    """Difficulty of a problem: a whole number, or a text that ends with one ("Level 5"); else 0."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    found = re.search(r"(?<![.\d])\d+$", text.strip())
    return int(found[0]) if found else 0


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is not a text")
    return value


def _not_empty(rows: list[Row], what: str, form: str) -> list[Row]:
    """The rows; refuses an empty list."""
    if not rows:
        raise DataError(what, hint=f"give {form}")
    return rows


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
