"""What a recipe demands to be signed is refused where it is not: before any work, and before it is served."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from components.core.base.errors import RecipeError, UntrustedArtifact
from components.core.store.signatures import sign_artifact
from components.core.store.store import Store, open_store
from pipelines.cli import run_command
from pipelines.recipe.checks import check
from pipelines.recipe.schema import load_recipe
from pipelines.records.runs import artifact, run_record
from pipelines.run.chat import served_model
from pipelines.run.local_runner import run_recipe
from tests.components.core.store.test_signatures import key_pair
from tests.pipelines.made_up_run import make_run

TINY = "data.arithmetic={num_train: 60, num_chats: 20, num_validation: 10, num_test: 10}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def test_data_that_is_not_signed_stops_a_run_before_it_begins(only_data: Path, tmp_path: Path, store: Store) -> None:
    private, public = key_pair(tmp_path)
    (tmp_path / "corpus.txt").write_text("words and words\n" * 50)
    recipe = load_recipe(only_data, [TINY, f"corpus={tmp_path / 'corpus.txt'}", f"trust.keys={public}"])
    screen = Console(file=io.StringIO())
    with pytest.raises(UntrustedArtifact, match=r"the own_corpus [0-9a-f]{64} is not signed") as caught:
        run_recipe(recipe, store_uri=store.uri, name=None, console=screen)
    assert store.documents("runs/") == []
    digest = caught.value.message.split()[2]
    assert run_command(["store", "sign", digest, "--key", str(private), "--store", store.uri]) == 0
    assert run_record(store, run_recipe(recipe, store_uri=store.uri, name=None, console=screen))["sources"] == {
        "own_corpus": digest
    }


def test_data_that_is_not_signed_stops_a_compilation(
    only_data: Path, tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = key_pair(tmp_path)
    (tmp_path / "corpus.txt").write_text("words and words\n" * 50)
    settings = ["--set", f"corpus={tmp_path / 'corpus.txt'}", "--set", f"trust.keys={public}", "--set", TINY]
    command = ["compile", str(only_data), *settings, "--store", store.uri, "-o", str(tmp_path / "pipeline.yaml")]
    assert run_command(command) == 2
    digest = capsys.readouterr().err.split("own_corpus ")[1].split()[0]
    assert not (tmp_path / "pipeline.yaml").exists()
    sign_artifact(store, digest, private)
    assert run_command(command) == 0
    assert digest in (tmp_path / "pipeline.yaml").read_text()


def test_a_model_is_served_only_once_it_is_signed(tmp_path: Path, store: Store) -> None:
    run = make_run(store)
    private, public = key_pair(tmp_path)
    assert served_model(store, run).is_dir()  # nothing is demanded
    record = run_record(store, run)
    record["recipe"]["trust"] = {"keys": [str(public)], "require": ["deploy"]}
    store.put_document(f"runs/{run}/run.json", record)
    with pytest.raises(UntrustedArtifact, match=r"the model [0-9a-f]{64} is not signed"):
        served_model(store, run)
    assert run_command(["serve", run, "--store", store.uri]) == 2
    assert run_command(["chat", run, "--store", store.uri]) == 2
    sign_artifact(store, artifact(store, run, "bundle"), private)
    assert served_model(store, run).is_dir()


def test_whoever_serves_may_demand_more_than_the_recipe(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's record can be written by anybody who may write to the store."""
    run = make_run(store)
    (mine, public), (other, _) = key_pair(tmp_path, "mine"), key_pair(tmp_path, "other")
    sign_artifact(store, artifact(store, run, "bundle"), other)
    assert run_command(["serve", run, "--store", store.uri, "--trust", str(public)]) == 2
    monkeypatch.setenv("TESSERA_TRUST", str(public))
    assert run_command(["serve", run, "--store", store.uri]) == 2
    with pytest.raises(UntrustedArtifact):
        served_model(store, run, [public])
    assert run_command(["store", "sign", f"{run}/bundle", "--key", str(mine), "--store", store.uri]) == 0
    assert served_model(store, run, [public]).is_dir()


def test_what_is_demanded_is_checked_with_the_recipe(only_data: Path) -> None:
    trusted = load_recipe(only_data, ["trust={keys: [a.pub, b.pub], require: [parent]}"]).trust
    assert trusted is not None
    assert (trusted.keys, trusted.require) == ((Path.cwd() / "a.pub", Path.cwd() / "b.pub"), ("parent",))
    with pytest.raises(RecipeError, match=r"trust.keys: no such file: .*a.pub"):
        check(load_recipe(only_data, ["trust.keys=a.pub"]))
    for wrong in ("trust={}", "trust={keys: []}", "trust={keys: a.pub, require: [everything]}"):
        with pytest.raises(RecipeError, match="trust"):
            load_recipe(only_data, [wrong])
