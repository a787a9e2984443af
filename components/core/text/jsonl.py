"""Files of users: the error names malformed lines, and no row is used before all files were read."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from components.core.base.errors import DataError
from components.core.text.row_files import Row, user_rows

MAX_FAULTS_SHOWN = 5
T = TypeVar("T")


def read_user_rows(
    paths: Iterable[Path], parse: Callable[[Row], T], *, skip_bad: bool, notes: list[str] | None = None
) -> tuple[list[T], int]:
    """Parse every row of some files.

    Args:
        paths: JSON Lines in UTF-8, JSON arrays, or Parquet; blank lines and lines in another encoding are malformed.
        parse: converts a row, or raises ValueError with the reason why it cannot.
        skip_bad: skip malformed lines instead of raising.
        notes: takes one sentence for each reason why lines were skipped.

    Returns:
        The parsed rows, and how many lines were skipped.

    Raises:
        DataError: there are malformed lines; the message has their number, and the first place of each reason.
    """
    parsed: list[T] = []
    bad: list[tuple[str, str]] = []
    for path in paths:
        for place, row in user_rows(path):
            try:
                if isinstance(row, ValueError):
                    raise row
                parsed.append(parse(row))
            except (ValueError, KeyError, TypeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                bad.append((f"{path.name} {place}".rstrip(), reason))
    if bad and not skip_bad:
        raise DataError(
            f"{len(bad)} malformed lines: {first_few(by_reason(bad))}",
            hint="correct them, or leave them out with --skip-bad",
        )
    if notes is not None:
        notes += [f"left out: {fault}" for fault in by_reason(bad)]
    return parsed, len(bad)


def by_reason(faults: Sequence[tuple[str, str]]) -> list[str]:
    """Pairs of place and reason as sentences, one for each reason: its first place, and how many more there are."""
    places: dict[str, list[str]] = {}
    for place, reason in faults:
        places.setdefault(reason, []).append(place)
    return [
        f"{found[0]}: {reason}" + (f" (and {len(found) - 1:,} more like it)" if len(found) > 1 else "")
        for reason, found in places.items()
    ]


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
