import os
import re
from pathlib import Path

import pytest

from infra.testcluster import build
from infra.testcluster.build import MODULE_SETS, ModuleSet, SourceFolder, module_set
from infra.testcluster.layout import Layout, TestClusterError

GO = """#!/bin/sh
case "$1 $2" in
  "env GOVERSION") echo go{version} ;;
  "mod download") printf '{{"Dir": "%s"}}' "{source}" ;;
  "mod edit") ;;
  "build "*) echo "$@" > "{log}"; {build} ;;
esac
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "root")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleSet:
    """A module set of one program, whose sources the test owns."""
    monkeypatch.setattr(build, "MODULES", tmp_path)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "go.mod").write_text("module toy\n\ngo 1.26.8\n")
    (tmp_path / "toy" / "go.sum").write_text("")
    (tmp_path / "source" / "config").mkdir(parents=True)
    (tmp_path / "source" / "config" / "crd.yaml").write_text("kind: CustomResourceDefinition\n")
    return ModuleSet(
        name="toy",
        renamed={"server": "toyd"},
        manifests={"toy": SourceFolder(module="example.com/toy", folder="config")},
    )


def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, version: str = "1.26.8", command: str = "exit 1") -> Path:
    """Put a program named go first in PATH; the file that it writes its arguments to is returned."""
    program, log = tmp_path / "bin" / "go", tmp_path / "arguments"
    program.parent.mkdir()
    program.write_text(GO.format(version=version, source=tmp_path / "source", log=log, build=command))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return log


MAKES_SERVER = 'while [ "$1" != -o ]; do shift; done; touch "$2/server"'


def test_a_build_leaves_programs_and_manifests_under_its_digest(tmp_path, monkeypatch, layout, modules) -> None:
    log = go(tmp_path, monkeypatch, command=MAKES_SERVER)
    build.build(modules, layout)
    folder = layout.binaries / f"toy-{modules.digest()[:16]}"
    assert (folder / "toyd").exists()
    assert (folder / "manifests" / "toy" / "crd.yaml").read_text() == "kind: CustomResourceDefinition\n"
    assert "-trimpath" in log.read_text().split()


def test_a_failed_build_leaves_nothing_and_shows_the_compilers_words(tmp_path, monkeypatch, layout, modules) -> None:
    go(tmp_path, monkeypatch, command="echo undefined: Setpgid >&2; exit 1")
    with pytest.raises(TestClusterError, match=r"toy failed:\nundefined: Setpgid"):
        build.build(modules, layout)
    assert list(layout.binaries.iterdir()) == []


def test_a_incomplete_module_is_built_from_a_copy_that_has_the_missing_file(
    tmp_path, monkeypatch, layout, modules
) -> None:
    log = go(tmp_path, monkeypatch, command=f'cp -r "$PWD" {tmp_path}/seen; {MAKES_SERVER}')
    patched = modules.model_copy(
        update={"incomplete_module": "example.com/toy", "copied_files": {"config/b.yaml": "config/crd.yaml"}}
    )
    build.build(patched, layout)
    assert re.search(r"-modfile=\S+/go\.mod", log.read_text())
    assert not (tmp_path / "source" / "config" / "b.yaml").exists()


def test_the_digest_follows_sources_and_settings(modules) -> None:
    before = modules.digest()
    assert modules.model_copy(update={"tags": "netgo"}).digest() != before
    (modules.source / "go.sum").write_text("example.com/toy v1.0.0 h1:abc=\n")
    assert modules.digest() != before


def test_an_old_compiler_is_refused_with_both_versions(tmp_path, monkeypatch) -> None:
    go(tmp_path, monkeypatch, version="1.26.7")
    with pytest.raises(TestClusterError, match=r"go is 1\.26\.7, .* need 1\.26\.8"):
        build.check_go()


def test_a_missing_compiler_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TestClusterError, match=r"install Go 1\.26\.8 or newer"):
        build.check_go()


def test_all_module_sets_ask_for_one_compiler_and_pin_their_modules() -> None:
    files = [(modules.source / "go.mod").read_text() for modules in MODULE_SETS]
    assert {version for text in files for version in re.findall(r"^go (\S+)$", text, re.M)} == {"1.26.8"}
    for modules in MODULE_SETS:
        text = (modules.source / "go.mod").read_text()
        assert "latest" not in text
        assert ("require" in text) == (modules.source / "go.sum").exists()


def test_the_staging_modules_of_kubernetes_have_its_minor_version() -> None:
    for name in ("kube", "ctrl"):
        staged = re.findall(r"=> k8s\.io/\S+ (v\S+)", (module_set(name).source / "go.mod").read_text())
        assert set(staged) <= {build.KUBERNETES.replace("1.", "v0.", 1)}


def test_a_module_set_of_manifests_alone_compiles_nothing(tmp_path, monkeypatch, layout, modules) -> None:
    log = go(tmp_path, monkeypatch)
    build.build(modules.model_copy(update={"packages": "", "renamed": {}}), layout)
    (made,) = layout.binaries.iterdir()
    assert [path.relative_to(made).as_posix() for path in made.rglob("*.yaml")] == ["manifests/toy/crd.yaml"]
    assert not log.exists()
