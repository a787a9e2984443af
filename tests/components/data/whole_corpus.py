"""A corpus read whole, which only tests do."""

from pathlib import Path

from components.core.text.row_files import Row
from components.data.own_files import CorpusReader


def corpus_rows(folder: Path, *, skip_bad: bool, notes: list[str] | None = None) -> tuple[list[Row], int]:
    """All rows of a folder, and how many lines and files were skipped."""
    reader = CorpusReader(folder, skip_bad, [] if notes is None else notes)
    return list(reader.rows()), reader.skipped
