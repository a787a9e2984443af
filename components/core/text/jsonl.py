"""JSONL that users wrote: every malformed line is named, and nothing is used until the whole file was read."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

from components.core.base.errors import DataError

MAX_FAULTS_SHOWN = 5
MAX_LINE_BYTES = 64 << 20
"""Longest line that is read; a row is a text or a conversation."""

Row = dict[str, object]
T = TypeVar("T")


def read_user_rows(paths: Iterable[Path], parse: Callable[[Row], T], *, skip_bad: bool) -> tuple[list[T], int]:
    """Parse every line of some JSONL files.

    Args:
        paths: JSONL files, UTF-8; lines that are blank or no UTF-8 count as malformed.
        parse: makes something of a row, or raises ValueError with the reason.
        skip_bad: leave malformed lines out instead of refusing the files.

    Returns:
        What was parsed, and how many lines were left out.

    Raises:
        DataError: there are malformed lines; names file, count, first line numbers and reasons.
    """
    parsed: list[T] = []
    bad: list[str] = []
    for path in paths:
        with path.open("rb") as stream:
            for number, line in enumerate(_lines(stream), 1):
                try:
                    parsed.append(parse(_object(line)))
                except (ValueError, KeyError, TypeError) as error:
                    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                    bad.append(f"{path.name} line {number}: {reason}")
    if bad and not skip_bad:
        raise DataError(
            f"{len(bad)} malformed lines: {first_few(bad)}", hint="mend them, or go on without them: --skip-bad"
        )
    return parsed, len(bad)


def first_few(faults: Sequence[str]) -> str:
    """As many faults as a message shows."""
    return "; ".join(faults[:MAX_FAULTS_SHOWN]) + ("; …" if len(faults) > MAX_FAULTS_SHOWN else "")


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSONL; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def decode(content: bytes) -> str:
    """Bytes as the text they are; a byte-order mark is no part of it.

    Raises:
        ValueError: they are not UTF-8, or have a zero byte, which no text has.
    """
    if b"\0" in content:
        raise ValueError("binary, not text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{content[error.start]:02x} at {error.start})") from None


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines, of those that are too long only as much as shows it."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n") and (line := stream.readline(MAX_LINE_BYTES + 1)):
            pass


def _object(line: bytes) -> Row:
    """The JSON object of one line."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
    text = decode(line)
    if not text.strip():
        raise ValueError("empty line")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    if "\\ud" in text.lower() and _half_characters(value):
        raise ValueError("half of a surrogate pair, which is no character")
    return value


def _half_characters(value: Row) -> bool:
    """Whether a text in the value cannot be written as UTF-8, which JSON's escapes can ask for."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
