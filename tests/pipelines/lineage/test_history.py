"""Lineage of a small history, two recipes, shared data, one retrained stage, against what was really done."""

import json
import sqlite3
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from pydantic import JsonValue

from components.core.base.config import digest_of
from components.core.lineage.curves import record_curves
from components.core.lineage.replay import sync_pending_runs
from components.core.runtime.runner import run_stage
from components.core.store.store import open_store
from pipelines.cli import run_command
from pipelines.lineage.ancestry import LineageGraph, file_digest, find_artifact
from pipelines.recipe.graph import Graph, Made
from pipelines.records import runs
from pipelines.run.ingest import ingest
from tests.components.core.mlflow_records import mlflow_records
from tests.pipelines.toy_stage import ToyConfig, files_read, toy_stage

DATA = toy_stage("data", {"own_corpus": "data"}, {"corpus": "data", "tokenizer": "tokenizer"})
PARENT = toy_stage("pretrain", {"corpus": "data", "tokenizer": "tokenizer"}, {"trained": "model"})
SFT = toy_stage("sft", {"model": "model", "chats": "data"}, {"tuned": "model"})
EVAL = toy_stage("eval", {"model": "model", "problems": "data"}, {"metrics": "table"})
DEPLOY = toy_stage("deploy", {"model": "model"}, {"bundle": "model"})


class World:
    """A store with three runs: of one recipe, of another that shares data and parent, and of the first retrained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = open_store(folder / "store")
        for name in ("shared", "chats-a", "chats-b", "problems", "unused"):
            (folder / f"{name}.jsonl").write_text(json.dumps({"rows of": name}) + "\n")
        self.roles = {
            "alpha-1": self.run("alpha", "chats-a"),
            "beta-1": self.run("beta", "chats-b"),
            "alpha-2": self.run("alpha", "chats-a", sft_seed=2),
        }
        ingest(self.store, "own_corpus", [str(folder / "unused.jsonl")], "data")

    def file(self, name: str) -> str:
        """Digest of one of the user's files."""
        return sha256((self.folder / f"{name}.jsonl").read_bytes()).hexdigest()

    def run(self, recipe: str, chats: str, sft_seed: int = 1) -> dict[str, str]:
        """Run a recipe through the real runner; returns digests by role."""
        sources = {
            name: ingest(self.store, name, [str(self.folder / f"{file}.jsonl")], "data")
            for name, file in (("own_corpus", "shared"), ("own_chats", chats), ("own_problems", "problems"))
        }
        settings: dict[str, JsonValue] = {"name": recipe, "sft": sft_seed, "chats": chats}
        roles = {"corpus": ("data", "corpus"), "parent": ("parent", "trained"), "sft": ("sft", "tuned")}
        roles |= {"metrics": ("eval", "metrics"), "bundle": ("deploy", "bundle")}
        graph = Graph(recipe, digest_of(settings), roles={role: Made(*made) for role, made in roles.items()})
        name = runs._claim_number(self.store, recipe, runs._new_record(settings, graph, sources))

        def run(stage: Any, label: str, config: ToyConfig, **inputs: str) -> dict[str, str]:
            return run_stage(stage, config, inputs, store=self.store, label=label, run=name).outputs

        data = run(DATA, "data", ToyConfig(), own_corpus=sources["own_corpus"])
        parent = run(PARENT, "parent", ToyConfig(), **data)["trained"]
        tuned = run(SFT, "sft", ToyConfig(seed=sft_seed), model=parent, chats=sources["own_chats"])["tuned"]
        run(EVAL, "eval", ToyConfig(), model=tuned, problems=sources["own_problems"])
        run(DEPLOY, "deploy", ToyConfig(registered_model=recipe), model=tuned)
        runs.end_run(self.store, name, "succeeded")
        record_curves(self.store, name)
        return runs.artifacts(self.store, name)

    def truth(self, digest: str) -> dict[str, Any]:
        """What an artifact says of its own making."""
        made: dict[str, Any] = json.loads(self.store.read(digest, "made.json"))
        return made

    def models(self) -> set[str]:
        """All models of the store."""
        digests = {Path(path).stem for path in self.store.documents("artifacts/")}
        return {digest for digest in digests if self.store.manifest(digest).kind == "model"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_the_history_has_the_expected_models(world: World) -> None:
    alpha, beta, again = (world.roles[run] for run in ("alpha-1", "beta-1", "alpha-2"))
    assert alpha["parent"] == beta["parent"] == again["parent"]
    assert len({roles["bundle"] for roles in world.roles.values()}) == 3
    assert len(world.models()) == 7


@pytest.mark.parametrize("run", ["alpha-1", "beta-1", "alpha-2"])
def test_a_served_model_leads_to_every_file_recipe_code_and_parent(world: World, run: str) -> None:
    bundle = find_artifact(world.store, run)
    found = LineageGraph(world.store).of_artifact(bundle)
    files = {entry["sha256"] for data in found["data"] for entry in data["files"].values()}
    data_read = {
        digest for digest in files_read(world.truth(bundle)) if digest in files or digest in _user_files(world)
    }
    assert files == data_read
    chats = "chats-a" if run.startswith("alpha") else "chats-b"
    assert files & _user_files(world) == {world.file("shared"), world.file(chats)}

    record = runs.run_record(world.store, run)
    assert [(recipe["digest"], recipe["runs"]) for recipe in found["recipes"]] == [(record["recipe_digest"], [run])]
    assert record["git_commit"]
    assert {stage["git_commit"] for stage in found["stages"]} == {record["git_commit"]}
    documents = runs.stage_documents(world.store, run)
    assert {stage["key"] for stage in found["stages"]} == {
        document["key"] for label, document in documents.items() if label != "eval"
    }
    for stage in found["stages"]:
        of_store = world.store.stage_record(stage["key"])
        assert of_store is not None
        assert (stage["code"], stage["config"]) == (of_store.code, of_store.config)
    assert [model["digest"] for model in found["models"]] == [world.roles[run]["sft"], world.roles[run]["parent"]]


@pytest.mark.parametrize("name", ["shared", "chats-a", "chats-b", "problems", "unused"])
@pytest.mark.parametrize("by", ["path", "sha256", "artifact"])
def test_a_data_file_leads_to_every_model_derived_from_it(world: World, name: str, by: str) -> None:
    digest = world.file(name)
    derived = {model for model in world.models() if digest in files_read(world.truth(model))}
    if by == "artifact":
        (holder,) = LineageGraph(world.store).of_file(digest)["artifacts"]
        found = LineageGraph(world.store).of_artifact(find_artifact(world.store, holder["digest"]))
    else:
        asked = str(world.folder / f"{name}.jsonl") if by == "path" else digest
        assert file_digest(world.store, asked) == digest
        found = LineageGraph(world.store).of_file(digest)
    assert {model["digest"] for model in found["derived_models"]} == derived
    assert bool(derived) == (name not in ("problems", "unused"))


def test_a_registered_model_is_the_one_that_was_deployed_last(world: World) -> None:
    for name in ("alpha", "alpha@champion", "models:/alpha@champion"):
        assert find_artifact(world.store, name) == world.roles["alpha-2"]["bundle"]
    assert find_artifact(world.store, "beta@champion") == world.roles["beta-1"]["bundle"]


def test_the_command_answers_both_ways(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    def output(what: str, *options: str) -> str:
        assert run_command(["lineage", what, "--store", world.store.uri, *options]) == 0
        return capsys.readouterr().out

    bundle = world.roles["alpha-2"]["bundle"]
    assert json.loads(output("alpha-2", "--json"))["digest"] == bundle
    tree = output("alpha")
    for words in (bundle[:12], world.file("shared"), world.file("chats-a"), "alpha-2", "by sft (code "):
        assert words in tree
    path = str(world.folder / "chats-b.jsonl")
    assert {model["digest"] for model in json.loads(output(path, "--json"))["derived_models"]} == {
        world.roles["beta-1"]["sft"],
        world.roles["beta-1"]["bundle"],
    }
    assert "derived models: 2" in output(path)
    (world.folder / "stranger").write_text("stranger")
    assert run_command(["lineage", str(world.folder / "stranger"), "--store", world.store.uri]) == 2
    assert "contains a file with sha256" in capsys.readouterr().err


@pytest.fixture(scope="module")
def database(world: World) -> Path:
    """The MLflow database of the history."""
    path = world.store.local / "mlflow.db"
    assert sync_pending_runs(world.store, f"sqlite:///{path}") == ["alpha-1", "beta-1", "alpha-2"]
    return path


def test_mlflow_has_the_same_lineage_in_both_directions(world: World, database: Path) -> None:
    uri = f"sqlite:///{database}"
    client = MlflowClient(uri, registry_uri=uri)
    experiments = [found.experiment_id for found in client.search_experiments() if found.name in ("alpha", "beta")]
    stages: list[Any] = [
        client.get_run(run.info.run_id)
        for run in client.search_runs(experiments, max_results=1000)
        if "tessera.dev/stage" in run.data.tags
    ]
    digest_of_model = {
        model.model_id: model.tags["tessera.dev/digest"] for model in client.search_logged_models(experiments)
    }
    read: dict[str, set[str]] = {}
    for stage in stages:
        data = {
            sha for one in stage.inputs.dataset_inputs for sha in json.loads(one.dataset.profile)["sha256"].values()
        }
        data |= {digest_of_model[one.model_id] for one in stage.inputs.model_inputs}
        for name, address in stage.data.tags.items():
            if name.startswith("tessera.dev/output."):
                made = address.rpartition("#")[2]
                of_made = {entry.sha256 for entry in world.store.manifest(made).files.values()}
                for each in {made} | of_made:
                    read.setdefault(each, set()).update(data)

    def all_read(digest: str) -> set[str]:
        return read.get(digest, set()).union(*(all_read(each) for each in read.get(digest, set())))

    for recipe, run in (("alpha", "alpha-2"), ("beta", "beta-1")):
        version = client.get_model_version_by_alias(recipe, "champion")
        digest = version.tags["tessera.dev/digest"]
        assert digest == world.roles[run]["bundle"]
        assert version.tags["tessera.dev/recipe-digest"] == runs.run_record(world.store, run)["recipe_digest"]
        assert all_read(digest) & _user_files(world) == files_read(world.truth(digest)) & _user_files(world)
    for name in ("shared", "chats-a", "chats-b", "problems"):
        seen = {model for model in world.models() if world.file(name) in all_read(model)}
        assert seen == {model for model in world.models() if world.file(name) in files_read(world.truth(model))}


def test_a_lost_database_is_made_again_from_the_store(world: World, database: Path) -> None:
    before = {recipe: mlflow_records(database, recipe, recipe) for recipe in ("alpha", "beta")}
    assert len(before["alpha"]["runs"]) == 12
    assert before["alpha"]["versions"][-1]["aliases"] == ["champion"]
    lost = database.rename(database.with_suffix(".lost"))
    command = [
        sys.executable,
        "-c",
        "import sys; from pipelines.cli import run_command; sys.exit(run_command(sys.argv[1:]))",
    ]
    command += ["lineage", "rebuild", "--store", world.store.uri]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "MLflow has the records of 3 runs again: alpha-1, beta-1, alpha-2" in done.stdout
    rebuilt = database.with_name("rebuilt.db")
    database.rename(rebuilt)  # this process has the old one open under its name
    lost.rename(database)
    assert {recipe: mlflow_records(rebuilt, recipe, recipe) for recipe in ("alpha", "beta")} == before
    with sqlite3.connect(rebuilt) as connection:
        assert connection.execute("SELECT COUNT(*) FROM metrics").fetchone()[0] > 0


def test_rebuilding_what_is_there_makes_nothing_twice(world: World, database: Path) -> None:
    before = {recipe: mlflow_records(database, recipe, recipe) for recipe in ("alpha", "beta")}
    sync_pending_runs(world.store, f"sqlite:///{database}", anew=True)
    assert {recipe: mlflow_records(database, recipe, recipe) for recipe in ("alpha", "beta")} == before


def _user_files(world: World) -> set[str]:
    return {world.file(path.stem) for path in world.folder.glob("*.jsonl")}
