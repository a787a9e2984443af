"""Converts the files of a user to the rows that the stages read: text, JSON Lines, JSON arrays and Parquet."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from components.core.base.errors import DataError
from components.core.text.jsonl import Faults, first_few, parse_user_rows, read_user_rows
from components.core.text.judges.reasoning_tasks import Verifier
from components.core.text.problems import with_distinct_ids
from components.core.text.row_files import (
    NOT_DOWNLOADED,
    ROW_SUFFIXES,
    Row,
    data_suffix,
    decode,
    is_lfs_pointer,
    open_bytes,
)
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


@dataclass
class CorpusReader:
    """Reads the rows {text} or {prompt, completion} of a corpus one at a time: one for each text file or row.

    Attributes:
        folder: files of any names, in folders of any depth.
        skip_bad: skip malformed lines and binary files instead of raising.
        notes: takes one sentence for each reason why something was left out.
        skipped: lines and files that were skipped so far.
    """

    folder: Path
    skip_bad: bool
    notes: list[str] = field(default_factory=list)
    skipped: int = 0

    def rows(self, part: int | None = None) -> Iterator[Row]:
        """All rows, or those of one of several corpora.

        Raises:
            DataError: malformed lines, binary files, or no text at all; after the last row.
        """
        tables, texts = _data_files(self.folder, self.notes, part)
        faults, empty = Faults(), True
        for row in parse_user_rows(tables, _corpus_row, faults):
            empty = False
            yield row
        faults.refuse(skip_bad=self.skip_bad, notes=self.notes)
        bad: list[tuple[str, str]] = []
        for path in texts:
            try:
                text = _read_text(path)
            except (ValueError, OSError, EOFError) as error:
                bad.append((path.relative_to(self.folder).as_posix(), str(error)))
            else:
                if text.strip():
                    empty = False
                    yield {"text": text}
        self._refuse_files(bad)
        self.skipped += faults.count + len(bad)
        if empty:
            form = "text files, JSON Lines, a JSON array or Parquet with rows {text}"
            raise DataError("the corpus holds no text", hint=f"give {form}")

    def _refuse_files(self, bad: Sequence[tuple[str, str]]) -> None:
        """Refuse files that are no text, or note that they are left out."""
        if bad and not self.skip_bad:
            raise DataError(
                f"{len(bad)} files of the corpus are no text: "
                f"{first_few([f'{place}: {reason}' for place, reason in bad])}",
                hint="remove them, convert them to UTF-8, or leave them out with --skip-bad",
            )
        faults = Faults()
        for place, reason in bad:
            faults.add(place, reason)
        self.notes += [f"left out: {fault}" for fault in faults.by_reason()]


def count_parts(folder: Path) -> int:
    """Over how many files and folders a recipe names its corpus; 1 where they are not numbered."""
    numbers = {int(found[0]) for path in folder.iterdir() if (found := re.match(r"\d{3}(?=-)", path.name))}
    return max(numbers, default=0) + 1


def _read_text(path: Path) -> str:
    if is_lfs_pointer(path):
        raise ValueError(NOT_DOWNLOADED)
    with open_bytes(path) as stream:
        return decode(stream.read())


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


def questions(chat: Row) -> list[str]:
    """Questions of a chat: the user messages."""
    messages = chat["messages"]
    assert isinstance(messages, list)
    return [message["content"] for message in messages if message["role"] == "user"]


T = TypeVar("T")


def _all_rows(
    folder: Path, parse: Callable[[Row], T], *, skip_bad: bool, notes: list[str] | None
) -> tuple[list[T], int]:
    """Every row of a folder; where no file is named as one of rows, all are read as JSON Lines."""
    tables, others = _data_files(folder, notes if notes is not None else [])
    return read_user_rows([*tables, *others], parse, skip_bad=skip_bad, notes=notes)


def _data_files(folder: Path, notes: list[str], part: int | None = None) -> tuple[list[Path], list[Path]]:
    """Files of rows, and others; hidden ones, and cards of a data set beside files of rows, are left out."""
    paths = folder.rglob("*") if part is None else _below(folder.glob(f"{part:03d}-*"))
    files = sorted(path for path in paths if path.is_file() and not _is_hidden(path.relative_to(folder)))
    cards = [path for path in files if CARDS.fullmatch(_own_name(path.name))]
    tables = [path for path in files if data_suffix(path) in ROW_SUFFIXES and path not in cards]
    if not tables:
        return [path for path in files if data_suffix(path) in ROW_SUFFIXES], [
            path for path in files if data_suffix(path) not in ROW_SUFFIXES
        ]
    if cards:
        notes.append(f"left out: {len(cards)} files that describe the data, such as {cards[0].name}")
    return tables, sorted(set(files).difference(tables, cards))


def _below(paths: Iterable[Path]) -> Iterator[Path]:
    """The paths, and all that is in them."""
    for path in paths:
        yield path
        yield from path.rglob("*")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _own_name(name: str) -> str:
    """A file's name without the number that an input of several files gives it."""
    return re.sub(r"^\d{3}-", "", name)


def _corpus_row(row: Row) -> Row:
    if "prompt" in row and "completion" in row:
        return {"prompt": _text(row, "prompt"), "completion": _text(row, "completion")}
    return {"text": _text(row, "content" if "content" in row and "text" not in row else "text")}


def _problem_row(row: Row) -> Row:
    question, identity = _question(row), row.get("id")
    verifier = {"verifier": row["verifier"]} if Verifier.of_row(row) is not None else {}
    return {
        "id": str(identity) if identity is not None else hashlib.sha256(question.encode()).hexdigest()[:16],
        "question": question,
        "prompt": f"{question}\nAnswer:",
        "answer": _answer(row),
        "level": _level(row.get("level")),
        **verifier,
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
