"""Files of users: the error names malformed lines, and no row is used before all files were read."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from components.core.base.errors import DataError
from components.core.text.row_files import Row, user_rows

MAX_FAULTS_SHOWN = 5
MAX_EXCERPT = 80
"""Characters of a malformed row that a note shows."""
T = TypeVar("T")


@dataclass
class Faults:
    """Malformed rows by reason: how many there are, and the place and the beginning of the first one."""

    count: int = 0
    _reasons: dict[str, list[str]] = field(default_factory=dict)
    """Place and excerpt of the first row of each reason, and the number of the others."""
    _more: dict[str, int] = field(default_factory=dict)

    def add(self, place: str, reason: str, row: Row | None = None) -> None:
        """Count a malformed row; None where it is no row at all."""
        self.count += 1
        if reason in self._reasons:
            self._more[reason] = self._more.get(reason, 0) + 1
        else:
            self._reasons[reason] = [place, _excerpt(row)]

    def by_reason(self, *, excerpts: bool = False) -> list[str]:
        """A sentence for each reason: its first place, how many more there are, and what the first one says."""
        return [
            f"{place}: {reason}"
            + (f" (and {more:,} more like it)" if (more := self._more.get(reason, 0)) else "")
            + (f", such as {excerpt}" if excerpts and excerpt else "")
            for reason, (place, excerpt) in self._reasons.items()
        ]

    def refuse(self, *, skip_bad: bool, notes: list[str] | None) -> None:
        """Refuse the rows, or note for each reason that they are left out.

        Raises:
            DataError: there are some, and they must not be skipped.
        """
        if self.count and not skip_bad:
            raise DataError(
                f"{self.count} malformed lines: {first_few(self.by_reason())}",
                hint="correct them, or leave them out with --skip-bad",
            )
        if notes is not None:
            notes += [f"left out: {fault}" for fault in self.by_reason(excerpts=True)]


def parse_user_rows(paths: Iterable[Path], parse: Callable[[Row], T], faults: Faults) -> Iterator[T]:
    """Every row of some files that can be parsed, read one at a time.

    Args:
        paths: JSON Lines in UTF-8, JSON arrays, or Parquet; blank lines and lines in another encoding are malformed.
        parse: converts a row, or raises ValueError with the reason why it cannot.
        faults: takes the malformed rows.
    """
    for path in paths:
        for place, row in user_rows(path):
            try:
                if isinstance(row, ValueError):
                    raise row
                parsed = parse(row)
            except (ValueError, KeyError, TypeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                faults.add(f"{path.name} {place}".rstrip(), reason, None if isinstance(row, ValueError) else row)
            else:
                yield parsed


def _excerpt(row: Row | None) -> str:
    """The beginning of a row; empty where there is none, or it cannot be written."""
    try:
        return "" if row is None else json.dumps(row, ensure_ascii=False, default=str)[:MAX_EXCERPT]
    except (RecursionError, TypeError, ValueError):
        return ""


def read_user_rows(
    paths: Iterable[Path], parse: Callable[[Row], T], *, skip_bad: bool, notes: list[str] | None = None
) -> tuple[list[T], int]:
    """Parse every row of some files; see `parse_user_rows`.

    Args:
        paths: the files.
        parse: converts a row, or raises ValueError with the reason why it cannot.
        skip_bad: skip malformed lines instead of raising.
        notes: takes one sentence for each reason why lines were skipped.

    Returns:
        The parsed rows, and how many lines were skipped.

    Raises:
        DataError: there are malformed lines; the message has their number, and the first place of each reason.
    """
    faults = Faults()
    parsed = list(parse_user_rows(paths, parse, faults))
    faults.refuse(skip_bad=skip_bad, notes=notes)
    return parsed, faults.count


def first_few(faults: Sequence[str]) -> str:
    """The first faults, as many as one message shows."""
    return "; ".join(faults[:MAX_FAULTS_SHOWN]) + ("; …" if len(faults) > MAX_FAULTS_SHOWN else "")


def write_rows(path: Path, rows: Iterable[Row], *, append: bool = False) -> int:
    """Write rows as JSONL, or append them; returns how many."""
    count = 0
    with path.open("a" if append else "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
