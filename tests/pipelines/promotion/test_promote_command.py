"""`tessera promote`: the same evidence and edit by hand."""

import json
from pathlib import Path

import pytest
import yaml

from components.core.lineage.champion import champion
from components.core.store.store import Store, open_store
from infra.chart import render
from pipelines.cli import run_command
from pipelines.lineage.ancestry import find_artifact
from pipelines.retraining.cluster import BUNDLE_ANNOTATION
from tests.pipelines.promotion.evaluated_run import answers, record_run
from tests.pipelines.promotion.git_server import FILE


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "nano.yaml"
    path.write_text(FILE.format(digest=""))
    return path


def test_the_file_changes_and_the_page_is_printed(store: Store, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = record_run(store, "nano-1", answers(0.8))
    arguments = ["--to", str(file), "--store", store.uri]
    assert run_command(["promote", "nano-1", *arguments]) == 0
    assert file.read_text() == FILE.format(digest=first)
    shown = capsys.readouterr()
    assert f"## Bundle `{first}`" in shown.out
    assert "commit and push it" in shown.err
    assert run_command(["promote", "nano-1", *arguments]) == 0
    assert "names this bundle already" in capsys.readouterr().err

    second = record_run(store, "nano-2", answers(0.9, seed=0))
    assert run_command(["promote", "latest", *arguments, "--when", "accuracy_on", "--when", "format", "--json"]) == 0
    gate = json.loads(capsys.readouterr().out)
    assert (gate["bundle"], gate["champion"], gate["passed"]) == (second, first, True)
    assert file.read_text() == FILE.format(digest=second)


def served_digests(file: Path) -> list[str]:
    """Digests of the models that the chart serves with a file as its values."""
    rollouts = (one for one in render(yaml.safe_load(file.read_text())) if one["kind"] == "Rollout")
    return [one["metadata"]["annotations"][BUNDLE_ANNOTATION] for one in rollouts]


def test_the_chart_serves_what_the_file_names_and_nothing_before(store: Store, file: Path) -> None:
    assert served_digests(file) == []
    for run, accuracy in (("nano-1", 0.8), ("nano-2", 0.9)):
        bundle = record_run(store, run, answers(accuracy))
        assert run_command(["promote", run, "--to", str(file), "--store", store.uri]) == 0
        assert served_digests(file) == [bundle]


def test_a_reader_of_the_file_sees_all_of_the_old_text_or_all_of_the_new(store: Store, file: Path) -> None:
    bundle = record_run(store, "nano-1", answers(0.8))
    (link := file.with_name("link.yaml")).symlink_to(file)
    file.chmod(0o640)
    with file.open() as reader:
        assert run_command(["promote", "nano-1", "--to", str(link), "--store", store.uri]) == 0
        assert reader.read() == FILE.format(digest="")
    assert file.read_text() == FILE.format(digest=bundle)
    assert (link.is_symlink(), file.stat().st_mode & 0o777) == (True, 0o640)
    assert sorted(path.name for path in file.parent.glob("*.yaml*")) == ["link.yaml", "nano.yaml"]


def test_a_key_that_the_file_does_not_have_is_answered_with_those_that_it_has(
    store: Store, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record_run(store, "nano-1", answers(0.8))
    file.write_text(FILE.format(digest="").replace("nano:", "small:"))
    assert run_command(["promote", "nano-1", "--to", str(file), "--store", store.uri]) == 2
    shown = capsys.readouterr().err
    assert "has no key serving.models.nano.digest" in shown
    assert "below serving.models there is small" in shown
    assert (
        run_command(
            ["promote", "nano-1", "--to", str(file), "--key", "serving.models.small.digest", "--store", store.uri]
        )
        == 0
    )


def test_a_worse_model_leaves_the_file_as_it_is(store: Store, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = record_run(store, "nano-1", answers(0.9))
    record_run(store, "nano-2", answers(0.7))
    file.write_text(FILE.format(digest=served))
    assert run_command(["promote", "nano-2", "--to", str(file), "--store", store.uri]) == 1
    shown = capsys.readouterr()
    assert "accuracy_on: -20.0 points" in shown.err
    assert "**not passed**" in shown.out
    assert file.read_text() == FILE.format(digest=served)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "{file}", "--key", "model.digest"], "has no key model.digest"),
        (["--to", "{file}.absent"], "cannot be read"),
        (["--to", "{file}", "--confidence", "2"], "options.confidence=2.0"),
        (["--to", "{file}", "--when", "luck"], "options.when.0='luck'"),
        (["--to", "{file}", "--sign", "{file}"], "is no private key"),
        ([], "--to FILE puts the digest into a file"),
    ],
)
def test_wrong_use_is_named(
    arguments: list[str], words: str, store: Store, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record_run(store, "nano-1", answers(0.9))
    given = [each.format(file=file) for each in arguments]
    assert run_command(["promote", "nano-1", *given, "--store", store.uri]) == 2
    assert words in capsys.readouterr().err
    assert file.read_text() == FILE.format(digest="")


def test_what_serves_is_the_champion_of_the_registry(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    first = record_run(store, "nano-1", answers(0.8))
    second = record_run(store, "nano-2", answers(0.9))
    assert champion(store, "nano") is None
    for run, bundle in (("nano-1", first), ("nano-2", second), ("nano-1", first)):
        assert run_command(["promote", run, "--served", "--store", store.uri]) == 0
        assert bundle in capsys.readouterr().out
        assert find_artifact(store, "models:/nano@champion") == bundle
    assert find_artifact(store, "nano") == second
