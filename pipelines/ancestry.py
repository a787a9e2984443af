"""What an artifact was made from, and what was made from it, told from the stage records alone."""

from pathlib import Path
from typing import Any

from rich.tree import Tree

from components.core.artifacts import describe
from components.core.errors import InputError
from components.core.store import StageRecord, Store
from pipelines.names import nearest
from pipelines.runs import artifact, artifacts, find_run, flat, run_names, run_records


def find_artifact(store: Store, name: str) -> str:
    """Digest of `RUN/ROLE`, a role in the latest run, the beginning of a digest, a run (its last model), or a folder.

    Raises:
        InputError: nothing has this name.
    """
    if Path(name).is_dir():
        return _digest_of_folder(store, Path(name))
    run, slash, role = name.removeprefix("run://").partition("/")
    if slash:
        return artifact(store, run, role)
    runs = run_names(store)
    if name == "latest" or name in runs:
        return artifact(store, name, "bundle")
    if runs and name in (latest := artifacts(store, find_run(store, "latest"))):
        return latest[name]
    found = {digest for digest in _made_by(store) if digest.startswith(name)} if len(name) >= 6 else set()
    if len(found) != 1:
        raise InputError(f"no artifact {name!r}", hint="name RUN/ROLE, a role, a run, a digest, or an exported folder")
    return found.pop()


def ancestry_of(store: Store, digest: str) -> dict[str, Any]:
    """Ancestors of an artifact down to the data, and what was made from it, as plain values."""
    made_by = _made_by(store)
    roles = _roles(store)
    return {**_ancestors(digest, made_by, roles), "descendants": _descendants(digest, made_by, roles)}


def as_tree(found: dict[str, Any]) -> Tree:
    """The same as a drawing: what it was made from below it, then what was made from it."""
    tree = Tree(_describe(found))
    shown: set[str] = set()
    for name, ancestor in found["inputs"].items():
        _grow(tree, name, ancestor, shown)
    if found["descendants"]:
        branch = tree.add("made from it")
        for descendant in found["descendants"]:
            branch.add(_describe(descendant))
    return tree


def _grow(tree: Tree, name: str, found: dict[str, Any], shown: set[str]) -> None:
    """Add an ancestor with all that it was made from; one that stands further up already is only named."""
    if found["digest"] in shown and found["inputs"]:
        tree.add(f"{name}: {found['digest'][:12]}, see above")
        return
    shown.add(found["digest"])
    branch = tree.add(f"{name}: {_describe(found)}")
    for inner, ancestor in found["inputs"].items():
        _grow(branch, inner, ancestor, shown)


def _describe(found: dict[str, Any]) -> str:
    made = f" by {found['stage']} (code {found['code'][:8]})" if found["stage"] else " given"
    return f"{found['digest'][:12]}{made}  {', '.join(found['roles'])}".rstrip()


def _made_by(store: Store) -> dict[str, StageRecord]:
    """The stage record behind each artifact; a stage that passed on what it was given did not make it."""
    return {
        digest: record
        for record in store.stage_records()
        for digest in record.outputs.values()
        if digest not in flat(record.inputs).values()
    }


def _roles(store: Store) -> dict[str, list[str]]:
    """Run and role of each artifact."""
    roles: dict[str, list[str]] = {}
    for record in run_records(store):
        for role, digest in artifacts(store, record["run"]).items():
            roles.setdefault(digest, []).append(f"{record['run']}/{role}")
        for source, digest in record["sources"].items():
            roles.setdefault(digest, []).append(f"{record['run']}:{source}")
    return roles


def _ancestors(digest: str, made_by: dict[str, StageRecord], roles: dict[str, list[str]]) -> dict[str, Any]:
    record = made_by.get(digest)
    inputs = {} if record is None else flat(record.inputs)
    return {
        "digest": digest,
        "roles": roles.get(digest, []),
        "stage": record.stage if record else None,
        "key": record.key if record else None,
        "code": record.code if record else None,
        "inputs": {name: _ancestors(value, made_by, roles) for name, value in inputs.items()},
    }


def _descendants(digest: str, made_by: dict[str, StageRecord], roles: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Everything that has the artifact among its ancestors, nearest first."""
    found: dict[str, dict[str, Any]] = {}
    frontier = {digest}
    while frontier:
        children = {
            output: record
            for output, record in made_by.items()
            if output not in found and frontier.intersection(flat(record.inputs).values())
        }
        for output, record in children.items():
            about = {"stage": record.stage, "key": record.key, "code": record.code}
            found[output] = {"digest": output, "roles": roles.get(output, []), **about}
        frontier = set(children)
    return list(found.values())


def _digest_of_folder(store: Store, folder: Path) -> str:
    """The artifact that a folder was exported from: the one with the same files."""
    files = describe(folder, "model").files
    known = list(_made_by(store))
    for digest in known:
        if store.manifest(digest).files == files:
            return digest
    raise InputError(f"{folder} holds no artifact of {store.uri}", hint=nearest(folder.name, run_names(store)))
