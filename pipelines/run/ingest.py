"""Brings the files that a recipe names into the store, and finds artifacts that are in a store already."""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from components.core.base.errors import InputError
from components.core.model.inspection import checkpoint_notes, write_as_read
from components.core.store.manifest import FileEntry, Kind, Manifest, hash_file
from components.core.store.store import Store, open_store
from pipelines.recipe.llama_nemotron import sources_of
from pipelines.recipe.schema import Recipe, is_address
from pipelines.recipe.source_files import KINDS, files_of, numbered_name, recipe_key

logger = logging.getLogger(__name__)
QUICK_BYTES = 256 << 20
"""As much as is read within a second, to tell what is cached."""


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
    if kind == "model":
        for note in checkpoint_notes(Path(paths[0])):
            logger.warning("%s: %s", recipe_key(name), note)
    with staged(files, kind, paths) as staging:
        return store.put_folder(staging, kind).digest


@contextmanager
def staged(files: Mapping[str, Path], kind: Kind, paths: Sequence[str]) -> Iterator[Path]:
    """A folder of links to the files of an artifact. A model says what is meant, so that vLLM reads it alike."""
    with tempfile.TemporaryDirectory(prefix="tessera-") as name:
        staging = Path(name)
        for target, path in files.items():
            link = staging / target
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        if kind == "model":
            write_as_read(Path(paths[0]), staging)
        yield staging


def ingest_sources(store: Store, recipe: Recipe) -> dict[str, str]:
    """Bring everything that a recipe names into the store, signed where the recipe requires it; digests by input.

    Raises:
        InputError: a file is not there, or not of its kind.
        UntrustedArtifact: the parent or data is not signed by a trusted key.
    """
    sources = {name: ingest(store, name, paths, KINDS[name]) for name, paths in sources_of(recipe).items()}
    for name, digest in sources.items():
        part = "parent" if name == "parent" else "data"
        if recipe.trust is not None and part in recipe.trust.require:
            from components.core.store.signatures import demand_signature

            demand_signature(store, digest, recipe.trust.keys, name)
    return sources


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
    with staged(files, kind, paths) as staging:
        return Manifest(kind=kind, files={target: hash_file(staging / target) for target in files}).digest


def _shard_by_shard(store: Store, paths: Sequence[str]) -> Iterator[str]:
    """The same paths, with the shards that `run://RUN/library` stands for in its place."""
    from pipelines.records.runs import artifacts, find_run

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
        files |= {numbered_name(index, inner): entry for inner, entry in part.items()}
    return Manifest(kind=kind, files=files).digest


def _from_address(store: Store, name: str, address: str, kind: Kind) -> str:
    """Digest of an artifact that is in a store already; one of another store is copied over."""
    from pipelines.records.runs import artifact

    if address.startswith("run://"):
        run, _, role = address.removeprefix("run://").partition("/")
        digest = artifact(store, run, role)
    else:
        elsewhere, mark, digest = address.rpartition("#")
        if mark and elsewhere != store.uri:
            return store.put_folder(open_store(elsewhere).fetch(digest), kind).digest
    found = store.manifest(digest).kind
    if found != kind:
        raise InputError(f"{recipe_key(name)}: {address} is a {found}, not a {kind}")
    return digest
