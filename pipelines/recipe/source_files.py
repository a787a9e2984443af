"""The user's own files, brought into a store as artifacts; and addresses of artifacts that are in one already."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.core.base.errors import InputError
from components.core.model.inspection import MODEL_SUFFIXES, check_checkpoint, model_files
from components.core.store.manifest import Kind
from components.core.text.row_files import COMPRESSED, ROW_SUFFIXES, data_suffix

logger = logging.getLogger(__name__)
SNIFFED_BYTES = 4096
QUICK_BYTES, QUICK_FILES = 16 << 20, 1000
"""As much as is looked at to know how long rows are."""
LINES = (".jsonl", ".ndjson")
"""Endings of files with a row a line."""
USUAL = 0.99
"""Share of the rows that count as usual."""
KINDS: Mapping[str, Kind] = {
    "parent": "model",
    "own_corpus": "data",
    "own_chats": "data",
    "own_problems": "data",
    "own_tasks": "data",
    "own_costs": "table",
    "own_libraries": "library",
}
"""Kind of each artifact that a recipe names."""
RECIPE_KEYS = {
    "own_corpus": "corpus",
    "own_chats": "sft.data",
    "own_problems": "rl.data",
    "own_tasks": "eval.task_files",
    "own_costs": "search.costs",
    "own_libraries": "search.libraries",
}
"""Where a recipe names what a stage takes under another name."""


def files_of(name: str, paths: Sequence[str], kind: Kind) -> Iterator[tuple[str, Path]]:
    """The files that an input consists of, each with its place in the artifact.

    Raises:
        InputError: a path does not exist, or is no folder where one is needed.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{recipe_key(name)}: no such file or folder: {path}")
    if kind in ("model", "tokenizer"):
        yield from _model_files(name, Path(paths[0]), kind)
    elif kind == "table" and Path(paths[0]).is_file():
        # A table is known by its one file name, whatever the user called it.
        yield f"{name.removeprefix('own_')}.json", Path(paths[0])
    elif kind == "library":
        yield from _library_files(name, paths)
    elif len(paths) == 1 and Path(paths[0]).is_dir():
        yield from _all_files(Path(paths[0]))
    elif len(paths) == 1 and not name.startswith("own_"):
        yield "train.jsonl", Path(paths[0])
    else:
        yield from _numbered(paths)


def _model_files(name: str, folder: Path, kind: Kind) -> Iterator[tuple[str, Path]]:
    """The files of a model folder that count; the folder is checked from its headers first."""
    if not folder.is_dir():
        raise InputError(f"{recipe_key(name)}: {folder} is a file, not a {kind} folder")
    if kind == "model":
        check_checkpoint(folder)
        yield from ((path.name, path) for path in model_files(folder))
        return
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in MODEL_SUFFIXES and not path.name.startswith("."):
            yield path.name, path


def _library_files(name: str, paths: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The files of library folders, those of several beside each other."""
    for index, folder in enumerate(map(Path, paths)):
        if not folder.is_dir():
            raise InputError(f"{recipe_key(name)}: {folder} is a file, not a library folder")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            inner = path.relative_to(folder).as_posix()
            yield numbered_name(index, inner) if len(paths) > 1 else inner, path


def numbered_name(index: int, inner: str) -> str:
    """Where a file of one of several libraries lies."""
    return f"{index:03d}/{inner}"


def _all_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder that is neither hidden nor binary; a warning names what is left out."""
    binary: list[str] = []
    for path in _visible_files(folder):
        relative = path.relative_to(folder).as_posix()
        if _is_binary(path):
            binary.append(relative)
        else:
            yield relative, path
    if binary:
        logger.warning("%s: %d binary files are left out, such as %s", folder, len(binary), binary[0])


def _visible_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _is_binary(path: Path) -> bool:
    """Whether a file is neither text nor of a form that the data stage reads; text has no zero byte near its start."""
    if path.suffix.lower() in (".parquet", ".gz", ".zst"):
        return False
    with path.open("rb") as stream:
        return b"\0" in stream.read(SNIFFED_BYTES)


def _numbered(paths: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Several files and folders beside each other, numbered so that equal names do not meet."""
    for index, path in enumerate(map(Path, paths)):
        if path.is_dir():
            yield from ((f"{index:03d}-{path.name}/{inner}", file) for inner, file in _all_files(path))
        else:
            yield f"{index:03d}-{path.name}", path


def recipe_key(name: str) -> str:
    """The name by which the user knows an input."""
    return RECIPE_KEYS.get(name, name)


@dataclass(frozen=True)
class SourceSize:
    """How much the user's files hold, known without reading their rows.

    Attributes:
        num_bytes: of all files.
        row_bytes: that 99 % of the rows have at most: of a file of rows its lines, of a text file the whole.
    """

    num_bytes: int
    row_bytes: int


def quick_size(paths: Sequence[str]) -> SourceSize | None:
    """Size of JSON Lines and text files; None where a path is not there, or files of other kinds or too many are.

    Rows are not parsed, and of large files only the beginning is read, so this takes a moment. Of a folder with files
    of rows, such as a cloned data set, only those count.
    """
    if not all(Path(path).exists() for path in paths):
        return None
    files = [file for path in paths for file in _counted_files(Path(path))]
    if not files or len(files) > QUICK_FILES or any(_has_hidden_rows(file) for file in files):
        return None
    rows, unread = [file.stat().st_size for file in files if data_suffix(file) not in LINES], QUICK_BYTES
    for file in files:
        if data_suffix(file) in LINES and unread:
            with file.open("rb") as stream:
                content = stream.read(unread)
            unread -= len(content)
            rows += map(len, content.splitlines())
    rows = sorted(filter(None, rows))
    num_bytes = sum(file.stat().st_size for file in files)
    return SourceSize(num_bytes, rows[math.ceil(USUAL * len(rows)) - 1]) if rows else None


def _counted_files(path: Path) -> list[Path]:
    """The files of a path that count for its size."""
    files = [path] if path.is_file() else list(_visible_files(path))
    tables = [file for file in files if data_suffix(file) in ROW_SUFFIXES]
    return tables or [file for file in files[: QUICK_FILES + 1] if not _is_binary(file)]


def _has_hidden_rows(file: Path) -> bool:
    """Whether the bytes of a file do not show the lengths of its rows."""
    return file.suffix.lower() in COMPRESSED or data_suffix(file) in {*ROW_SUFFIXES} - {*LINES}
