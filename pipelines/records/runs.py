"""The records of runs in a store: begun, ended, listed, and asked for what they made; the list of all artifacts."""

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from components.core.base.errors import CorruptArtifact, InputError, StoreError
from components.core.base.run_name import RUN_NAME, check_run_name
from components.core.base.suggestions import nearest
from components.core.lineage.mlflow_entities import git_commit
from components.core.store.store import Store
from pipelines.recipe.graph import Graph
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import Recipe, filled_as_recorded, without_placements

Outcome = Literal["succeeded", "failed", "interrupted", "killed"]


def begin_run(store: Store, recipe: Recipe, sources: dict[str, str], name: str | None = None) -> str:
    """Write the record of a new run under a name that no other run has; returns the name.

    Args:
        store: where the record goes.
        recipe: what is run.
        sources: digests of the user's own artifacts.
        name: chosen by the user; a run of this name and recipe is continued, in other places if those have changed. By
            default, the recipe's name with a number.

    Raises:
        InputError: the name belongs to a run of another recipe, or no run can have it.
    """
    record = _new_record(recipe.canonical(), llama_nemotron(recipe), sources)
    if name is None:
        return _claim_number(store, recipe.name, record)
    if not store.claim(_record_path(name), {"run": name, **record}):
        found = store.read_document_or_none(_record_path(name))  # a damaged one is written anew
        if found is not None and not has_results_of(found, recipe):
            raise InputError(f"there is a run {name!r} of another recipe", hint="choose another --run NAME")
        store.put_document(_record_path(name), {"run": name, **record})
    return name


def as_recorded(store: Store, recipe: Recipe, name: str | None) -> Recipe:
    """A recipe to go on with as a run: what it leaves out is as that run has recorded it, where there is such a run."""
    record = None if name is None else store.read_document_or_none(_record_path(name))
    recorded = record.get("recipe") if isinstance(record, dict) else None
    return filled_as_recorded(recipe, recorded) if isinstance(recorded, dict) else recipe


def has_results_of(record: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether the run of a record is of this recipe, wherever its stages run."""
    recorded = record.get("recipe")
    return isinstance(recorded, dict) and without_placements(recorded) == without_placements(recipe.canonical())


def begin_stage(store: Store, graph: Graph, settings: dict[str, JsonValue], sources: dict[str, str]) -> str:
    """Write the record of a run of one stage; its settings take the place of the recipe. Returns the run's name."""
    return _claim_number(store, graph.name, _new_record(settings, graph, sources))


def _new_record(recipe: dict[str, JsonValue], graph: Graph, sources: dict[str, str]) -> dict[str, Any]:
    """The record of a run that begins now."""
    return {
        "recipe": recipe,
        "recipe_name": graph.name,
        "recipe_digest": graph.digest,
        "git_commit": git_commit(),
        "started": time.time(),
        "finished": None,
        "status": "running",
        "sources": sources,
        "roles": {role: vars(binding) for role, binding in graph.roles.items()},
        "seconds": None,
    }


def _claim_number(store: Store, name: str, record: dict[str, Any]) -> str:
    """Write a record under a name with the next free number; other processes may do the same at the same time."""
    number = 1 + max((_number(run, name) for run in run_names(store)), default=0)
    while not store.claim(_record_path(f"{name}-{number}"), {"run": f"{name}-{number}", **record}):
        number += 1
    return f"{name}-{number}"


def end_run(store: Store, run: str, outcome: Outcome, *, finished: float | None = None) -> dict[str, Any]:
    """Record how a run ended, and when (Unix time, s; now if None); returns the record."""
    record = run_record(store, run)
    finished = finished or time.time()
    record |= {"status": outcome, "finished": finished, "seconds": finished - record["started"]}
    store.put_document(_record_path(run), record)
    return record


def run_names(store: Store) -> list[str]:
    """Names of all runs."""
    found = (path.removeprefix("runs/").removesuffix("/run.json") for path in store.documents("runs/"))
    return sorted(run for run in found if RUN_NAME.fullmatch(run))


def run_records(store: Store) -> list[dict[str, Any]]:
    """Records of all runs, oldest first; damaged ones, which `tessera store verify` names, are left out."""
    records = (store.read_document_or_none(_record_path(run)) for run in run_names(store))
    return sorted(filter(None, records), key=lambda record: record["started"])


def run_record(store: Store, run: str) -> dict[str, Any]:
    """The record of one run."""
    record = store.document(_record_path(run))
    if not isinstance(record, dict):
        raise InputError(f"no run {run!r} in {store.uri}", hint=nearest(run, run_names(store)))
    return dict(record)


def find_run(store: Store, name: str) -> str:
    """Resolve the name of a run; `latest` is the run that started last."""
    if name == "latest":
        records = run_records(store)
        if not records:
            raise InputError(
                f"no runs in {store.uri}", hint="tessera run RECIPE makes one; --store URI names another store"
            )
        return str(records[-1]["run"])
    return str(run_record(store, name)["run"])


def artifacts(store: Store, run: str) -> dict[str, str]:
    """Digests of the artifacts that a run made or read, by role."""
    record = run_record(store, run)
    digests = {role: _digest_of(store, record, binding) for role, binding in record["roles"].items()}
    return {role: digest for role, digest in digests.items() if digest is not None}


def artifact(store: Store, run: str, role: str) -> str:
    """Digest of the artifact that has a role in a run.

    Raises:
        InputError: no such role, or the run has not come so far.
    """
    name = find_run(store, run)
    known = artifacts(store, name)
    if role in known:
        return known[role]
    roles = run_record(store, name)["roles"]
    if role in roles:
        raise InputError(f"run {name!r} has not made {role!r} yet", hint="tessera run RECIPE goes on with it")
    raise InputError(f"run {name!r} has no artifact {role!r}", hint=nearest(role, list(roles)))


def read_file(store: Store, run: str, role: str, file: str) -> bytes | None:
    """A file of the artifact that has a role in a run; None where the run has no such artifact."""
    digest = artifacts(store, run).get(role)
    return None if digest is None or file not in store.manifest(digest).files else store.read(digest, file)


def read_table(store: Store, run: str, role: str, file: str) -> dict[str, Any] | None:
    """A JSON file of the artifact that has a role in a run; None where the run has no such artifact."""
    data = read_file(store, run, role, file)
    table: dict[str, Any] | None = None if data is None else json.loads(data)
    return table


def stage_documents(store: Store, run: str) -> dict[str, dict[str, Any]]:
    """Records of the stages of a run by label, in the order in which they started."""
    stages = [store.document(path) for path in store.documents(f"runs/{run}/stages/")]
    return {stage["label"]: stage for stage in sorted(stages, key=lambda stage: stage["started"])}


def _digest_of(store: Store, record: dict[str, Any], binding: dict[str, str]) -> str | None:
    """Digest behind a role, a source's `name` or a `task` and its `output`; None where its stage has not finished."""
    if "name" in binding:
        digest: str | None = record["sources"].get(binding["name"])
        return digest
    document = store.read_document_or_none(f"runs/{record['run']}/stages/{binding['task']}.json")
    stage = store.stage_record(document["key"]) if document is not None else None
    return stage.outputs.get(binding["output"]) if stage is not None else None


def _record_path(run: str) -> str:
    return f"runs/{check_run_name(run)}/run.json"


def _number(run: str, recipe_name: str) -> int:
    """The number in a run's name, 0 where it is not one of this recipe's."""
    name, _, number = run.rpartition("-")
    return int(number) if name == recipe_name and number.isdigit() else 0


# All artifacts of a store


def list_artifacts(store: Store) -> list[dict[str, Any]]:
    """Every artifact: `digest`, `kind` (None: damaged), number of `files`, `bytes`, `made_by` and `roles`."""
    makers, roles = _makers(store), _roles(store)
    return [
        {
            "digest": digest,
            **_contents(store, digest),
            "made_by": makers.get(digest, []),
            "roles": sorted(roles.get(digest, ())),
        }
        for digest in (Path(path).stem for path in store.documents("artifacts/"))
    ]


def _contents(store: Store, digest: str) -> dict[str, Any]:
    try:
        manifest = store.manifest(digest)
    except (CorruptArtifact, StoreError):
        return {"kind": None, "files": None, "bytes": None}
    return {"kind": manifest.kind, "files": len(manifest.files), "bytes": manifest.size}


def _makers(store: Store) -> dict[str, list[dict[str, str]]]:
    """Stages by the digest of what they made."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for record in store.stage_records():
        for output, digest in record.outputs.items():
            found[digest].append({"stage": record.stage, "output": output, "key": record.key})
    return found


def _roles(store: Store) -> dict[str, set[str]]:
    """`RUN/ROLE` by digest."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in run_records(store):
        for role, digest in (artifacts(store, record["run"]) | record["sources"]).items():
            found[digest].add(f"{record['run']}/{role}")
    return found
