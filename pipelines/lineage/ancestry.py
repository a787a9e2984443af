"""Lineage of artifacts: what each was made from and what was made from it, read from the store's records."""

import functools
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.tree import Tree

from components.core.base.errors import InputError
from components.core.base.suggestions import nearest
from components.core.lineage.champion import ALIAS, champion
from components.core.lineage.mlflow_entities import manifest_of
from components.core.store.artifact_store import manifest_path
from components.core.store.manifest import Manifest, describe, hash_file
from components.core.store.store import StageRecord, Store, digests_by_name
from pipelines.records.runs import artifact, artifacts, find_run, run_names, run_records, stage_documents

SHORTEST_PREFIX = 6
"""Characters of a digest, at least, that identify an artifact."""
MODEL_SCHEME, RUN_SCHEME = "models:/", "run://"


def find_artifact(store: Store, name: str) -> str:
    """Digest of the artifact that a user names.

    Args:
        store: where to look.
        name: `RUN/ROLE`, a role in the latest run, a run (its bundle), a registered model (`NAME` or `NAME@ALIAS`), the
            first characters of a digest, or an exported folder.

    Raises:
        InputError: nothing has this name.
    """
    if re.fullmatch("[0-9a-f]{64}", name) and store.backend.stat(manifest_path(name)) is not None:
        return name
    if Path(name).is_dir():
        return _digest_of_folder(store, Path(name))
    if not name.startswith(MODEL_SCHEME):
        run, slash, role = name.removeprefix(RUN_SCHEME).partition("/")
        if slash:
            return artifact(store, run, role)
        runs = run_names(store)
        if name == "latest" or name in runs:
            return artifact(store, name, "bundle")
        if runs and name in (latest := artifacts(store, find_run(store, "latest"))):
            return latest[name]
    if registered := _registered(store, name.removeprefix(MODEL_SCHEME)):
        return registered
    found = [digest for digest in _stored(store) if digest.startswith(name)] if len(name) >= SHORTEST_PREFIX else []
    if len(found) != 1:
        raise InputError(
            f"no artifact {name!r}",
            hint="name RUN/ROLE, a role, a run, a registered model, a digest, an exported folder, or a data file",
        )
    return found[0]


def file_digest(store: Store, name: str) -> str | None:
    """SHA-256 of a file, named by its path or by the SHA-256 itself; None where the name is of an artifact."""
    if Path(name).is_file():
        return hash_file(Path(name)).sha256
    is_digest = len(name) == 64 and set(name) <= set(string.hexdigits.lower())
    return name if is_digest and store.backend.stat(manifest_path(name)) is None else None


class LineageGraph:
    """Stages, runs and artifacts of a store, and how they depend on each other."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._runs = run_records(store)
        self._computed: dict[str, dict[str, Any]] = {}
        """Run that computed each stage, by stage key."""
        self._runs_of: dict[str, list[dict[str, Any]]] = {}
        """Runs that each stage is part of, by stage key."""
        for run in self._runs:
            for document in stage_documents(store, run["run"]).values():
                self._runs_of.setdefault(document["key"], []).append(run)
                if not document["cached"]:
                    self._computed.setdefault(document["key"], run)
        self._producers = self._find_producers()
        self._roles = self._find_roles()

    def of_artifact(self, digest: str) -> dict[str, Any]:
        """Ancestors and descendants of an artifact, as plain values.

        `inputs` is the tree of ancestors. Lists are `data` (data artifacts among the ancestors, with the digests of
        their files), `models` (models among the ancestors), `recipes`, `stages` (code and settings of every stage that
        produced an ancestor), `descendants`, and `derived_models` (models among the descendants).
        """
        lineage = self._with_ancestors(digest)
        descendants = [self._describe(each) for each in self._descendants([digest])]
        return {
            **self._ancestors(digest),
            "data": [self._with_files(each) for each in lineage if self._kind(each) == "data"],
            "models": [self._describe(each) for each in lineage if each != digest and self._kind(each) == "model"],
            "recipes": self._recipes(digest),
            "stages": self._stages(lineage),
            "descendants": descendants,
            "derived_models": [each for each in descendants if each["kind"] == "model"],
        }

    def of_file(self, sha256: str) -> dict[str, Any]:
        """Artifacts that contain a file, and in `derived_models` the models that contain it or were made from them.

        Raises:
            InputError: no artifact contains it.
        """
        containers = {
            digest: names
            for digest in _stored(self.store)
            if (names := [name for name, entry in self._files(digest).items() if entry["sha256"] == sha256])
        }
        if not containers:
            raise InputError(
                f"no artifact of {self.store.uri} contains a file with sha256 {sha256}", hint="check --store"
            )
        models = [each for each in (*containers, *self._descendants(containers)) if self._kind(each) == "model"]
        return {
            "sha256": sha256,
            "artifacts": [{**self._describe(digest), "files": names} for digest, names in containers.items()],
            "derived_models": [
                self._describe(each) | {"recipes": self._recipes(each)} for each in dict.fromkeys(models)
            ],
        }

    def _find_producers(self) -> dict[str, list[StageRecord]]:
        """Producing stages of each artifact, oldest first; stages that only forward an input are skipped.

        An artifact has several where changed code or settings gave an equal result.
        """
        order = {key: run["started"] for key, run in self._computed.items()}
        producers: dict[str, list[StageRecord]] = {}
        for record in sorted(self.store.stage_records(), key=lambda record: order.get(record.key, float("inf"))):
            for digest in record.outputs.values():
                if digest not in digests_by_name(record.inputs).values():
                    producers.setdefault(digest, []).append(record)
        return producers

    def _find_roles(self) -> dict[str, list[str]]:
        """Run and role of each artifact."""
        roles: dict[str, list[str]] = {}
        for run in self._runs:
            for role, digest in artifacts(self.store, run["run"]).items():
                roles.setdefault(digest, []).append(f"{run['run']}/{role}")
            for source, digest in run["sources"].items():
                roles.setdefault(digest, []).append(f"{run['run']}:{source}")
        return roles

    def _describe(self, digest: str) -> dict[str, Any]:
        """Description of one artifact; stage, key and code are its producer's, or None for a source."""
        producers = self._producers.get(digest, [])
        record = producers[0] if producers else None
        return {
            "digest": digest,
            "kind": self._kind(digest),
            "roles": self._roles.get(digest, []),
            "stage": record.stage if record else None,
            "key": record.key if record else None,
            "code": record.code if record else None,
            "git_commit": self._computed.get(record.key, {}).get("git_commit") if record else None,
            "also_made_by": [other.key for other in producers[1:]],
        }

    def _with_files(self, digest: str) -> dict[str, Any]:
        return self._describe(digest) | {"files": self._files(digest)}

    def _ancestors(self, digest: str) -> dict[str, Any]:
        inputs = {name: self._ancestors(value) for name, value in self._inputs(digest).items()}
        return {**self._describe(digest), "inputs": inputs}

    def _inputs(self, digest: str) -> dict[str, str]:
        """Inputs of the stage that produced an artifact, by name."""
        producers = self._producers.get(digest, [])
        return digests_by_name(producers[0].inputs) if producers else {}

    def _with_ancestors(self, digest: str) -> list[str]:
        """The artifact and all its ancestors, nearest first."""
        found = {digest: None}
        for each in (queue := [digest]):
            new = [value for value in self._inputs(each).values() if value not in found]
            found |= dict.fromkeys(new)
            queue += dict.fromkeys(new)
        return list(found)

    def _descendants(self, digests: Iterable[str]) -> list[str]:
        """All descendants of the artifacts, nearest first."""
        found: dict[str, None] = {}
        queue = list(digests)
        for each in queue:
            new = [output for output in self._consumers.get(each, []) if output not in found]
            found |= dict.fromkeys(new)
            queue += dict.fromkeys(new)
        return list(found)

    @functools.cached_property
    def _consumers(self) -> dict[str, list[str]]:
        """Artifacts that were made directly from each artifact."""
        consumers: dict[str, list[str]] = {}
        for output, records in self._producers.items():
            for digest in {value for record in records for value in digests_by_name(record.inputs).values()}:
                consumers.setdefault(digest, []).append(output)
        return consumers

    def _recipes(self, digest: str) -> list[dict[str, Any]]:
        """Recipes whose runs computed the artifact or found it in the cache."""
        recipes: dict[str, dict[str, Any]] = {}
        for record in self._producers.get(digest, []):
            for run in self._runs_of.get(record.key, []):
                recipe = {"digest": run["recipe_digest"], "name": run["recipe_name"], "runs": []}
                recipes.setdefault(run["recipe_digest"], recipe)["runs"].append(run["run"])
        return list(recipes.values())

    def _stages(self, digests: Iterable[str]) -> list[dict[str, Any]]:
        """Code and settings of every stage that produced one of the artifacts, each once."""
        producers = [self._producers[digest][0] for digest in digests if digest in self._producers]
        records = {record.key: record for record in producers}
        return [
            {
                "stage": record.stage,
                "key": key,
                "code": record.code,
                "libraries": record.libraries,
                "config": record.config,
                "git_commit": self._computed.get(key, {}).get("git_commit"),
            }
            for key, record in records.items()
        ]

    def _kind(self, digest: str) -> str | None:
        manifest = self._manifest(digest)
        return manifest.kind if manifest else None

    def _files(self, digest: str) -> dict[str, dict[str, Any]]:
        manifest = self._manifest(digest)
        return {name: entry.model_dump() for name, entry in manifest.files.items()} if manifest else {}

    @functools.cache  # noqa: B019  the graph is discarded after one command
    def _manifest(self, digest: str) -> Manifest | None:
        return manifest_of(self.store, digest)


def _stored(store: Store) -> Iterator[str]:
    """Digests of all artifacts."""
    return (Path(path).stem for path in store.documents("artifacts/"))


def _registered(store: Store, name: str) -> str | None:
    """Digest of the latest bundle of a registered model; with `@ALIAS`, of the latest with that alias."""
    name, _, alias = name.partition("@")
    if alias == ALIAS and (digest := champion(store, name)):
        return digest
    found = None
    for run in sorted(run_records(store), key=lambda run: run["finished"] or 0.0):
        for document in stage_documents(store, run["run"]).values():
            record = store.stage_record(document["key"]) if document["stage"] == "deploy" else None
            if record and record.result.get("registered_model") == name:
                wanted = not alias or record.result.get("alias") == alias
                found = record.outputs.get("bundle") if wanted else found
    return found


def _digest_of_folder(store: Store, folder: Path) -> str:
    """Digest of the artifact that a folder was exported from, which has the same files."""
    files = describe(folder, "model").files
    for digest in _stored(store):
        if (manifest := manifest_of(store, digest)) and manifest.files == files:
            return digest
    raise InputError(
        f"{folder} is not a copy of any artifact of {store.uri}", hint=nearest(folder.name, run_names(store))
    )


# Trees for the terminal


def artifact_tree(found: dict[str, Any]) -> Tree:
    """Tree of `LineageGraph.of_artifact`: ancestors, data files, recipes, then descendants."""
    tree = Tree(_line(found))
    printed: set[str] = set()
    for name, ancestor in found["inputs"].items():
        _add_ancestor(tree, name, ancestor, printed)
    if found["data"]:
        branch = tree.add("data files, with sha256")
        for data in found["data"]:
            part = branch.add(_line(data))
            for name, entry in data["files"].items():
                part.add(f"{entry['sha256']}  {name}")
    if found["recipes"]:
        branch = tree.add("recipes")
        for recipe in found["recipes"]:
            branch.add(f"{recipe['name']} {recipe['digest'][:12]}  {', '.join(recipe['runs'])}")
    if found["descendants"]:
        branch = tree.add("made from it")
        for descendant in found["descendants"]:
            branch.add(_line(descendant))
    return tree


def file_tree(found: dict[str, Any]) -> RenderableType:
    """Trees of `LineageGraph.of_file`: artifacts that contain the file, and the models derived from them."""
    containers = Tree(f"{found['sha256']} is in")
    for container in found["artifacts"]:
        containers.add(f"{_line(container)}: {', '.join(container['files'])}")
    models = Tree(f"derived models: {len(found['derived_models'])}")
    for model in found["derived_models"]:
        models.add(_line(model))
    return Group(containers, models)


def _add_ancestor(tree: Tree, name: str, found: dict[str, Any], printed: set[str]) -> None:
    """Add an ancestor and its own ancestors; one that is in the tree already is only named."""
    if found["digest"] in printed and found["inputs"]:
        tree.add(f"{name}: {found['digest'][:12]}, see above")
        return
    printed.add(found["digest"])
    branch = tree.add(f"{name}: {_line(found)}")
    for inner, ancestor in found["inputs"].items():
        _add_ancestor(branch, inner, ancestor, printed)


def _line(found: dict[str, Any]) -> str:
    commit = f", commit {found['git_commit'][:8]}" if found["git_commit"] else ""
    made = f"by {found['stage']} (code {found['code'][:8]}{commit})" if found["stage"] else "source"
    return f"{found['digest'][:12]} {found['kind'] or 'damaged'} {made}  {', '.join(found['roles'])}".rstrip()
