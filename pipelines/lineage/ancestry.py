"""What an artifact was made from, and what was made from it, told from the store's records alone."""

import functools
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from components.core.base.errors import InputError
from components.core.base.suggestions import nearest
from components.core.lineage.mlflow_entities import manifest_of
from components.core.store.artifact_store import manifest_path
from components.core.store.manifest import Manifest, describe, hash_file
from components.core.store.store import StageRecord, Store
from pipelines.records.runs import artifact, artifacts, find_run, flat, run_names, run_records, stage_documents

SHORTEST_PREFIX = 6
"""Characters of a digest that name an artifact."""
MODEL_SCHEME, RUN_SCHEME = "models:/", "run://"


def find_artifact(store: Store, name: str) -> str:
    """Digest of what a user names.

    Args:
        store: where to look.
        name: `RUN/ROLE`, a role in the latest run, a run (its bundle), a registered model (`NAME` or `NAME@ALIAS`), the
            beginning of a digest, or a folder that was exported.

    Raises:
        InputError: nothing has this name.
    """
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
    """SHA-256 of the file that a user names by its path, or by just this; None where an artifact is named."""
    if Path(name).is_file():
        return hash_file(Path(name)).sha256
    is_digest = len(name) == 64 and set(name) <= set(string.hexdigits.lower())
    return name if is_digest and store.backend.stat(manifest_path(name)) is None else None


class History:
    """All that the stages and runs of a store did."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._runs = run_records(store)
        self._computed: dict[str, dict[str, Any]] = {}
        """The run that computed a stage, by key."""
        self._runs_of: dict[str, list[dict[str, Any]]] = {}
        """Runs that a stage was part of, by key."""
        for run in self._runs:
            for document in stage_documents(store, run["run"]).values():
                self._runs_of.setdefault(document["key"], []).append(run)
                if not document["cached"]:
                    self._computed.setdefault(document["key"], run)
        self._makers = self._read_makers()
        self._roles = self._read_roles()

    def of_artifact(self, digest: str) -> dict[str, Any]:
        """An artifact's ancestors down to the data, and what was made from it, as plain values.

        Beside the tree of `inputs`, flat: `data` (each data artifact with the digests of its files), `models` (that it
        was made from), `recipes`, `stages` (code and settings of all on the way), `descendants`, and `seen_by` (the
        models among those).
        """
        above = self._above(digest)
        descendants = [self._about(each) for each in self._below([digest])]
        return {
            **self._ancestors(digest),
            "data": [self._with_files(each) for each in above if self._kind(each) == "data"],
            "models": [self._about(each) for each in above if each != digest and self._kind(each) == "model"],
            "recipes": self._recipes(digest),
            "stages": self._stages(above),
            "descendants": descendants,
            "seen_by": [found for found in descendants if found["kind"] == "model"],
        }

    def of_file(self, sha256: str) -> dict[str, Any]:
        """The artifacts that hold a file, and the models that have seen it: made from those, or holding it.

        Raises:
            InputError: no artifact holds it.
        """
        holders = {
            digest: names
            for digest in _stored(self.store)
            if (names := [name for name, entry in self._files(digest).items() if entry["sha256"] == sha256])
        }
        if not holders:
            raise InputError(f"no artifact of {self.store.uri} holds a file with sha256 {sha256}", hint="check --store")
        models = [each for each in (*holders, *self._below(holders)) if self._kind(each) == "model"]
        return {
            "sha256": sha256,
            "artifacts": [{**self._about(digest), "files": names} for digest, names in holders.items()],
            "seen_by": [self._about(each) | {"recipes": self._recipes(each)} for each in dict.fromkeys(models)],
        }

    def _read_makers(self) -> dict[str, list[StageRecord]]:
        """The stages behind each artifact, the first that made it first; who passes on what it was given made nothing.

        Equal results of changed code or settings have several.
        """
        order = {key: run["started"] for key, run in self._computed.items()}
        makers: dict[str, list[StageRecord]] = {}
        for record in sorted(self.store.stage_records(), key=lambda record: order.get(record.key, float("inf"))):
            for digest in record.outputs.values():
                if digest not in flat(record.inputs).values():
                    makers.setdefault(digest, []).append(record)
        return makers

    def _read_roles(self) -> dict[str, list[str]]:
        """Run and role of each artifact."""
        roles: dict[str, list[str]] = {}
        for run in self._runs:
            for role, digest in artifacts(self.store, run["run"]).items():
                roles.setdefault(digest, []).append(f"{run['run']}/{role}")
            for source, digest in run["sources"].items():
                roles.setdefault(digest, []).append(f"{run['run']}:{source}")
        return roles

    def _about(self, digest: str) -> dict[str, Any]:
        """What is known of one artifact; stage, key and code are those that made it, None where it was given."""
        makers = self._makers.get(digest, [])
        record = makers[0] if makers else None
        return {
            "digest": digest,
            "kind": self._kind(digest),
            "roles": self._roles.get(digest, []),
            "stage": record.stage if record else None,
            "key": record.key if record else None,
            "code": record.code if record else None,
            "git_commit": self._computed.get(record.key, {}).get("git_commit") if record else None,
            "also_made_by": [other.key for other in makers[1:]],
        }

    def _with_files(self, digest: str) -> dict[str, Any]:
        return self._about(digest) | {"files": self._files(digest)}

    def _ancestors(self, digest: str) -> dict[str, Any]:
        inputs = {name: self._ancestors(value) for name, value in self._inputs(digest).items()}
        return {**self._about(digest), "inputs": inputs}

    def _inputs(self, digest: str) -> dict[str, str]:
        """What the artifact was made from, by name."""
        makers = self._makers.get(digest, [])
        return flat(makers[0].inputs) if makers else {}

    def _above(self, digest: str) -> list[str]:
        """The artifact and all its ancestors, nearest first."""
        found = {digest: None}
        for each in (queue := [digest]):
            new = [value for value in self._inputs(each).values() if value not in found]
            found |= dict.fromkeys(new)
            queue += dict.fromkeys(new)
        return list(found)

    def _below(self, digests: Iterable[str]) -> list[str]:
        """Everything that has one of the artifacts among its ancestors, nearest first."""
        found: dict[str, None] = {}
        queue = list(digests)
        for each in queue:
            new = [output for output in self._readers.get(each, []) if output not in found]
            found |= dict.fromkeys(new)
            queue += dict.fromkeys(new)
        return list(found)

    @functools.cached_property
    def _readers(self) -> dict[str, list[str]]:
        """What was made directly from each artifact."""
        readers: dict[str, list[str]] = {}
        for output, records in self._makers.items():
            for digest in {value for record in records for value in flat(record.inputs).values()}:
                readers.setdefault(digest, []).append(output)
        return readers

    def _recipes(self, digest: str) -> list[dict[str, Any]]:
        """Recipes in whose runs the artifact was made, or found made."""
        recipes: dict[str, dict[str, Any]] = {}
        for record in self._makers.get(digest, []):
            for run in self._runs_of.get(record.key, []):
                recipe = {"digest": run["recipe_digest"], "name": run["recipe_name"], "runs": []}
                recipes.setdefault(run["recipe_digest"], recipe)["runs"].append(run["run"])
        return list(recipes.values())

    def _stages(self, digests: Iterable[str]) -> list[dict[str, Any]]:
        """Code and settings of every stage that made one of the artifacts, each once."""
        makers = [self._makers[digest][0] for digest in digests if digest in self._makers]
        records = {record.key: record for record in makers}
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

    @functools.cache  # noqa: B019  a history lives as long as the answer to one question
    def _manifest(self, digest: str) -> Manifest | None:
        return manifest_of(self.store, digest)


def _stored(store: Store) -> Iterator[str]:
    """Digests of all artifacts."""
    return (Path(path).stem for path in store.documents("artifacts/"))


def _registered(store: Store, name: str) -> str | None:
    """The bundle that was deployed last as a registered model, under its alias where one is named."""
    name, _, alias = name.partition("@")
    found = None
    for run in sorted(run_records(store), key=lambda run: run["finished"] or 0.0):
        for document in stage_documents(store, run["run"]).values():
            record = store.stage_record(document["key"]) if document["stage"] == "deploy" else None
            if record and record.result.get("registered_model") == name:
                wanted = not alias or record.result.get("alias") == alias
                found = record.outputs.get("bundle") if wanted else found
    return found


def _digest_of_folder(store: Store, folder: Path) -> str:
    """The artifact that a folder was exported from: the one with the same files."""
    files = describe(folder, "model").files
    for digest in _stored(store):
        if (manifest := manifest_of(store, digest)) and manifest.files == files:
            return digest
    raise InputError(f"{folder} holds no artifact of {store.uri}", hint=nearest(folder.name, run_names(store)))
