"""JSONL files of users: the error names malformed lines, and no row is used before all files were read."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

from components.core.base.errors import DataError

MAX_FAULTS_SHOWN = 5
MAX_LINE_BYTES = 64 << 20
"""Longest line that is accepted, bytes; a row is one text or one conversation."""

Row = dict[str, object]
T = TypeVar("T")


def read_user_rows(paths: Iterable[Path], parse: Callable[[Row], T], *, skip_bad: bool) -> tuple[list[T], int]:
    """Parse every line of some JSONL files.

    Args:
        paths: JSONL files in UTF-8; blank lines and lines in another encoding count as malformed.
        parse: converts a row, or raises ValueError with the reason why it cannot.
        skip_bad: skip malformed lines instead of raising.

    Returns:
        The parsed rows, and how many lines were skipped.

    Raises:
        DataError: there are malformed lines; the message has their number, and file, line and reason of the first.
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
            f"{len(bad)} malformed lines: {first_few(bad)}", hint="correct them, or leave them out with --skip-bad"
        )
    return parsed, len(bad)


def first_few(faults: Sequence[str]) -> str:
    """The first faults, as many as one message shows."""
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
    """Decode UTF-8; a byte-order mark is removed.

    Raises:
        ValueError: the bytes are not UTF-8, or contain a zero byte, as binary files do.
    """
    if b"\0" in content:
        raise ValueError("binary, not text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{content[error.start]:02x} at {error.start})") from None


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines; one that is too long is cut just beyond the limit."""
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
    if "\\ud" in text.lower() and _has_lone_surrogate(value):
        raise ValueError("half of a surrogate pair (\\ud8xx), which is no character")
    return value


def _has_lone_surrogate(value: Row) -> bool:
    """Whether a string cannot be encoded as UTF-8, because a JSON escape wrote half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
