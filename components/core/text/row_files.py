"""The rows of a user's file: JSON Lines, a JSON array, or Parquet; also compressed with gzip or zstd."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MAX_LINE_BYTES = 64 << 20
"""Longest line that is accepted, bytes; a row is one text or one conversation."""
MAX_DOCUMENT_BYTES = 1 << 30
"""Largest file that is parsed as one JSON array, bytes; larger ones have to be JSON Lines or Parquet."""
COMPRESSED = (".gz", ".zst")
LFS_POINTER = b"version https://git-lfs."
"""How a file begins that Git LFS puts in the place of one that it has not downloaded."""
NOT_DOWNLOADED = "a pointer of Git LFS, not the data: run `git lfs pull` where the folder was cloned"
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
"""Endings of files of rows, before that of a compression."""

Row = dict[str, object]


class WrittenFloat(float):
    """A number of a JSON file; as text it is what was written, such as 0.00001 or 1e16."""

    text: str

    def __new__(cls, text: str) -> "WrittenFloat":
        """Parse a number; one that is too large becomes infinite."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        """What was written."""
        return self.text


def data_suffix(path: Path) -> str:
    """The ending of a file's name in lower case, without that of a compression."""
    names = [suffix.lower() for suffix in path.suffixes]
    return names[-2] if len(names) > 1 and names[-1] in COMPRESSED else names[-1] if names else ""


def user_rows(path: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """Every row with its place in the file, or the reason why it cannot be read; blank lines count as such."""
    try:
        if is_lfs_pointer(path):
            yield "", ValueError(NOT_DOWNLOADED)
        elif data_suffix(path) == ".parquet":
            yield from _parquet_rows(path)
        else:
            yield from _json_rows(path)
    except (OSError, EOFError, zlib.error) as error:
        yield "", ValueError(f"damaged: {str(error)[:200]}")


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a pointer of Git LFS, in the place of data that was not downloaded."""
    with path.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, and decompress it where its name ends with .gz or .zst."""
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.GzipFile(path, "rb"))
    if path.suffix.lower() == ".zst":
        import pyarrow  # slow to import, and only needed here

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


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


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row | ValueError]]:
    import pyarrow  # slow to import, and only needed here
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, ValueError) as error:
        yield f"after row {number}", ValueError(f"damaged Parquet: {str(error)[:200]}")


def _json_rows(path: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """Rows of one JSON array, else one row a line."""
    with open_bytes(path) as stream:
        start = stream.read(4096)
    if data_suffix(path) == ".json" or start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        with open_bytes(path) as stream:
            content = stream.read(MAX_DOCUMENT_BYTES + 1)
        items = _items(content)
        if items is not None:
            yield from ((f"item {number}", _as_row(item)) for number, item in enumerate(items, 1))
            return
    with open_bytes(path) as stream:
        for number, line in enumerate(_lines(stream), 1):
            try:
                yield f"line {number}", parse_object(line)
            except ValueError as error:
                yield f"line {number}", error


def _items(content: bytes) -> list[Any] | None:
    """The rows of a file that is one JSON value: an array, or an object with one list of objects; None for others."""
    if len(content) > MAX_DOCUMENT_BYTES:
        return None
    try:
        value = _parse(decode(content))
    except ValueError:
        return None
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        return lists[0] if len(lists) == 1 and not _is_chat(value) else [value]
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) and value else None


def _is_chat(value: Row) -> bool:
    return any(key in value for key in ("messages", "conversations", "conversation", "input", "prompt"))


def _as_row(item: Any) -> Row | ValueError:
    """An item of an array as a row."""
    if has_lone_surrogate(item):
        return ValueError("half of a surrogate pair (\\ud8xx), which is no character")
    row: Row = item
    return row


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines; one that is too long is cut just beyond the limit."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n") and (line := stream.readline(MAX_LINE_BYTES + 1)):
            pass


def parse_object(line: bytes) -> Row:
    """The JSON object of one line.

    Raises:
        ValueError: the line has none; says why.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
    text = decode(line)
    if not text.strip():
        raise ValueError("empty line")
    value = _parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    if "\\ud" in text.lower() and has_lone_surrogate(value):
        raise ValueError("half of a surrogate pair (\\ud8xx), which is no character")
    return value


def _parse(text: str) -> Any:
    """Parse JSON; decimal numbers keep their spelling."""
    try:
        return json.loads(text, parse_float=WrittenFloat)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def has_lone_surrogate(value: object) -> bool:
    """Whether a string cannot be encoded as UTF-8, because a JSON escape wrote half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
