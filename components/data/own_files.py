"""Converts the files of a user to the rows that the stages read: text, JSON Lines, JSON arrays and Parquet."""

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from components.core.base.errors import DataError
from components.core.text.jsonl import by_reason, first_few, read_user_rows
from components.core.text.problems import with_distinct_ids
from components.core.text.row_files import ROW_SUFFIXES, Row, data_suffix, decode, open_bytes
from components.core.text.verifier import boxed
from components.data.chat_forms import chat_row

CARDS = re.compile(
    r"(readme|licen[cs]e|notice|citation|contributing|changelog)\b.*|(dataset_infos?|dataset_dict|state)\.json",
    re.IGNORECASE,
)
"""Files that describe a data set; where a folder has files of rows, they are no part of the data."""
QUESTION_KEYS = ("question", "problem", "prompt", "query", "instruction")
ANSWER_KEYS = ("answer", "expected_answer", "ground_truth", "final_answer", "target")
GSM8K_MARK = "####"


def corpus_rows(folder: Path, *, skip_bad: bool, notes: list[str] | None = None) -> tuple[list[Row], int]:
    """Rows {text} or {prompt, completion}, one for each text file or row.

    Args:
        folder: files of any names, in folders of any depth.
        skip_bad: skip malformed lines and binary files instead of raising.
        notes: takes one sentence for each reason why something was left out.

    Returns:
        The rows, and how many lines and files were skipped.

    Raises:
        DataError: malformed lines, binary files, or no text at all.
    """
    tables, texts = _data_files(folder, notes)
    rows, skipped = read_user_rows(tables, _corpus_row, skip_bad=skip_bad, notes=notes)
    bad: list[tuple[str, str]] = []
    for path in texts:
        try:
            with open_bytes(path) as stream:
                text = decode(stream.read())
        except (ValueError, OSError, EOFError) as error:
            bad.append((path.relative_to(folder).as_posix(), str(error)))
        else:
            rows += [{"text": text}] if text.strip() else []
    if bad and not skip_bad:
        raise DataError(
            f"{len(bad)} files of the corpus are no text: {first_few([f'{place}: {reason}' for place, reason in bad])}",
            hint="remove them, convert them to UTF-8, or leave them out with --skip-bad",
        )
    if notes is not None:
        notes += [f"left out: {fault}" for fault in by_reason(bad)]
    form = "text files, JSON Lines, a JSON array or Parquet with rows {text}"
    return _not_empty(rows, "the corpus holds no text", form), skipped + len(bad)


def chat_rows(folder: Path, *, skip_bad: bool, notes: list[str] | None = None) -> tuple[list[Row], int]:
    """Rows {messages, reasoning}; the first message is the toggle. Also returns how many lines were skipped.

    Raises:
        DataError: malformed lines, or no chat at all.
    """
    rows, skipped = _all_rows(folder, chat_row, skip_bad=skip_bad, notes=notes)
    return _not_empty(rows, "there are no chats", "rows {messages}, {conversations} or {input, output}"), skipped


def problem_rows(folder: Path, *, skip_bad: bool, notes: list[str] | None = None) -> tuple[list[Row], int]:
    """Rows {id, question, prompt, answer, level}, with distinct ids. Also returns how many lines were skipped.

    Raises:
        DataError: malformed lines, or no problem at all.
    """
    rows, skipped = _all_rows(folder, _problem_row, skip_bad=skip_bad, notes=notes)
    return with_distinct_ids(_not_empty(rows, "there are no problems", "rows {question, answer}")), skipped


def questions(row: Row) -> list[str]:
    """Questions of a chat or a document: the user messages, the prompt, or else the text."""
    messages = row.get("messages")
    if isinstance(messages, list):
        return [message["content"] for message in messages if message["role"] == "user"]
    return [str(row["prompt"] if "prompt" in row else row["text"])]


T = TypeVar("T")


def _all_rows(
    folder: Path, parse: Callable[[Row], T], *, skip_bad: bool, notes: list[str] | None
) -> tuple[list[T], int]:
    """Every row of a folder; where no file is named as one of rows, all are read as JSON Lines."""
    tables, others = _data_files(folder, notes)
    return read_user_rows([*tables, *others], parse, skip_bad=skip_bad, notes=notes)


def _data_files(folder: Path, notes: list[str] | None) -> tuple[list[Path], list[Path]]:
    """Files of rows, and others; the cards of a data set are left out where there are files of rows."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    cards = [path for path in files if CARDS.fullmatch(_own_name(path.name))]
    tables = [path for path in files if data_suffix(path) in ROW_SUFFIXES and path not in cards]
    if not tables:
        return [path for path in files if data_suffix(path) in ROW_SUFFIXES], [
            path for path in files if data_suffix(path) not in ROW_SUFFIXES
        ]
    if cards and notes is not None:
        notes.append(f"left out: {len(cards)} files that describe the data, such as {cards[0].name}")
    return tables, sorted(set(files).difference(tables, cards))


def _own_name(name: str) -> str:
    """A file's name without the number that an input of several files gives it."""
    return re.sub(r"^\d{3}-", "", name)


def _corpus_row(row: Row) -> Row:
    if "prompt" in row and "completion" in row:
        return {"prompt": _text(row, "prompt"), "completion": _text(row, "completion")}
    return {"text": _text(row, "content" if "content" in row and "text" not in row else "text")}


def _problem_row(row: Row) -> Row:
    question, identity = _question(row), row.get("id")
    return {
        "id": str(identity) if identity is not None else hashlib.sha256(question.encode()).hexdigest()[:16],
        "question": question,
        "prompt": f"{question}\nAnswer:",
        "answer": _answer(row),
        "level": _level(row.get("level")),
    }


def _question(row: Row) -> str:
    """The question: a text, or the system and user messages of a prompt."""
    key = next((name for name in QUESTION_KEYS if name in row), "question")
    messages = row.get(key)
    if not isinstance(messages, list):
        return _text(row, key)
    texts = [message.get("content") for message in messages if isinstance(message, dict)]
    roles = [message.get("role") for message in messages if isinstance(message, dict)]
    if roles not in (["user"], ["system", "user"]) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{key} is neither a text nor one user message")
    return "\n\n".join(map(str, texts))


def _answer(row: Row) -> str:
    r"""The expected answer as it is written: a text or a number, what follows `####`, or the box of a solution."""
    key = next((name for name in ANSWER_KEYS if name in row), None)
    rewarded = row.get("reward_model")
    if key is not None:
        value = row[key]
    elif isinstance(rewarded, dict) and "ground_truth" in rewarded:
        key, value = "reward_model.ground_truth", rewarded["ground_truth"]
    elif "solution" in row:
        value = boxed(_text(row, "solution"))
        if value == row["solution"] or not value.strip():
            raise ValueError(r"solution has no \boxed{…}, and there is no answer")
    else:
        raise KeyError("answer")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}, which is no number")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"{key} is not a text or number")
    return str(value).rpartition(GSM8K_MARK)[2].strip() if GSM8K_MARK in str(value) else str(value)


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
