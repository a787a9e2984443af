"""The user's own files, brought into a store as artifacts; and addresses of artifacts that are in one already."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from components.core.artifacts import FileEntry, Kind, Manifest, hash_file
from components.core.errors import InputError
from components.core.inspection import check_checkpoint
from components.core.store import Store, open_store
from pipelines.recipe import is_address

MODEL_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model"})
"""Files of a model or tokenizer folder that count; read-me files, other formats and hidden folders are left behind."""
SNIFFED_BYTES = 4096
QUICK_BYTES = 256 << 20
"""As much as is read within a second, to tell what is cached."""
KINDS: Mapping[str, Kind] = {
    "parent": "model",
    "own_corpus": "data",
    "own_chats": "data",
    "own_problems": "data",
    "own_costs": "table",
    "own_libraries": "library",
}
"""Kind of each artifact that a recipe names."""
RECIPE_KEYS = {
    "own_corpus": "corpus",
    "own_chats": "sft.data",
    "own_problems": "rl.data",
    "own_costs": "search.costs",
    "own_libraries": "search.libraries",
}
"""Where a recipe names what a stage takes under another name."""


def ingest(store: Store, name: str, paths: Sequence[str], kind: Kind) -> str:
    """Bring files, a folder, or an artifact from elsewhere into the store; returns its digest.

    Args:
        store: where it goes.
        name: the input that it is for.
        paths: files and folders, or one address: `DIGEST`, `STORE#DIGEST` or `run://RUN/ROLE`. Libraries may be several
            of either; `run://RUN/library` is all shards of a run.
        kind: what it has to be.

    Raises:
        InputError: not there, or not of the kind.
    """
    paths = list(_shard_by_shard(store, paths)) if kind == "library" else paths
    if len(paths) == 1 and is_address(paths[0]):
        return _from_address(store, name, paths[0], kind)
    if kind == "library":
        paths = [str(store.fetch(_from_address(store, name, p, kind))) if is_address(p) else p for p in paths]
    files = dict(files_of(name, paths, kind))
    with tempfile.TemporaryDirectory(prefix="tessera-") as staging:
        for target, path in files.items():
            link = Path(staging, target)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        return store.put_folder(Path(staging), kind).digest


def source_digest(store: Store, name: str, paths: Sequence[str], kind: Kind) -> str | None:
    """The digest that `ingest` would give, with nothing stored; None where too much would have to be read to tell."""
    paths = list(_shard_by_shard(store, paths)) if kind == "library" else paths
    if len(paths) == 1 and is_address(paths[0]):
        return None if "#" in paths[0] else _from_address(store, name, paths[0], kind)
    if any(map(is_address, paths)):
        return _digest_of_several(store, name, paths, kind)
    files = dict(files_of(name, paths, kind))
    if sum(path.stat().st_size for path in files.values()) > QUICK_BYTES:
        return None
    return Manifest(kind=kind, files={target: hash_file(path) for target, path in files.items()}).digest


def files_of(name: str, paths: Sequence[str], kind: Kind) -> Iterator[tuple[str, Path]]:
    """The files that an input consists of, each with its place in the artifact.

    Raises:
        InputError: a path does not exist, or is no folder where one is needed.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{_shown(name)}: no such file or folder: {path}")
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
        raise InputError(f"{_shown(name)}: {folder} is a file, not a {kind} folder")
    if kind == "model":
        check_checkpoint(folder)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in MODEL_SUFFIXES:
            yield path.name, path


def _library_files(name: str, paths: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The files of library folders, those of several beside each other."""
    for index, folder in enumerate(map(Path, paths)):
        if not folder.is_dir():
            raise InputError(f"{_shown(name)}: {folder} is a file, not a library folder")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            inner = path.relative_to(folder).as_posix()
            yield _numbered_name(index, inner) if len(paths) > 1 else inner, path


def _numbered_name(index: int, inner: str) -> str:
    """Where a file of one of several libraries lies."""
    return f"{index:03d}/{inner}"


def _all_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder that is neither hidden nor binary."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts) and not _is_binary(path):
            yield relative.as_posix(), path


def _is_binary(path: Path) -> bool:
    """Whether a file is no text, told as grep tells it: by a zero byte near its beginning."""
    with path.open("rb") as stream:
        return b"\0" in stream.read(SNIFFED_BYTES)


def _numbered(paths: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Several files and folders beside each other, numbered so that equal names do not meet."""
    for index, path in enumerate(map(Path, paths)):
        if path.is_dir():
            yield from ((f"{index:03d}-{path.name}/{inner}", file) for inner, file in _all_files(path))
        else:
            yield f"{index:03d}-{path.name}", path


def _shard_by_shard(store: Store, paths: Sequence[str]) -> Iterator[str]:
    """The same paths, with the shards that `run://RUN/library` stands for in its place."""
    from pipelines.runs import artifacts, find_run

    for path in paths:
        run, _, role = path.removeprefix("run://").partition("/")
        if path.startswith("run://") and role == "library":
            name = find_run(store, run)
            shards = [known for known in artifacts(store, name) if known.startswith("library-")]
            if not shards:
                raise InputError(f"run {name!r} has made no library", hint="name a run whose search has finished")
            yield from (f"run://{name}/{shard}" for shard in shards)
        else:
            yield path


def _digest_of_several(store: Store, name: str, paths: Sequence[str], kind: Kind) -> str | None:
    """The digest of several artifacts as one; None where one of them is in no place that can be read quickly."""
    files: dict[str, FileEntry] = {}
    for index, path in enumerate(paths):
        if "#" in path or not is_address(path):
            return None
        part = store.manifest(_from_address(store, name, path, kind)).files
        files |= {_numbered_name(index, inner): entry for inner, entry in part.items()}
    return Manifest(kind=kind, files=files).digest


def _from_address(store: Store, name: str, address: str, kind: Kind) -> str:
    """Digest of an artifact that is in a store already; one of another store is copied over."""
    from pipelines.runs import artifact

    if address.startswith("run://"):
        run, _, role = address.removeprefix("run://").partition("/")
        digest = artifact(store, run, role)
    else:
        elsewhere, mark, digest = address.rpartition("#")
        if mark and elsewhere != store.uri:
            return store.put_folder(open_store(elsewhere).fetch(digest), kind).digest
    found = store.manifest(digest).kind
    if found != kind:
        raise InputError(f"{_shown(name)}: {address} is a {found}, not a {kind}")
    return digest


def _shown(name: str) -> str:
    """The name by which the user knows an input."""
    return RECIPE_KEYS.get(name, name)
