import re

import pytest

from infra.images import __main__ as command
from infra.images.build import BASES, PARTS, SITE_PACKAGES, START, remove_from_distribution
from infra.images.lock_parts import IMAGES
from infra.images.root import HOME, Root
from infra.lock import ROOT
from pipelines.recipe import pod_settings


def test_core_has_no_torch_and_each_image_adds_to_the_one_before_it() -> None:
    assert tuple(PARTS) == IMAGES
    assert "torch" not in PARTS["core"]
    for smaller, larger in (("core", "train"), ("train", "serve")):
        assert [part for part in PARTS[larger] if part in PARTS[smaller]] == list(PARTS[smaller])
    assert all(parts[-1] == "project" for parts in PARTS.values())


def test_no_image_has_a_compiler_but_those_that_compile() -> None:
    assert not {"g++", "gcc"} & set(BASES["base"])


def test_containers_start_the_command_line_of_stages_as_a_user_that_is_a_number_and_not_roots() -> None:
    assert START.entrypoint == ("python", "-m", "components.core.runtime.stage_command")
    assert int(START.user) > 0
    assert START.environment["HOME"] == START.working_folder == f"/{HOME}" == pod_settings.HOME


def test_the_python_of_the_base_is_one_that_the_project_takes() -> None:
    version = re.search(r"python3\.(\d+)/", SITE_PACKAGES)
    assert version is not None
    assert 11 <= int(version[1]) < 14


def test_make_gives_the_torch_that_it_pins_and_the_device_of_the_lock() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.partition("\nimages:")[2].partition("\n\n")[0]
    assert "--torch $(TORCH)" in recipe
    assert "requirements-%.lock=%" in recipe


def test_the_paths_of_a_tree_leave_out_what_belongs_to_a_running_machine(tmp_path) -> None:
    for folder in ("proc/1", "tmp/x", "usr/tmp", "build/cache"):
        (tmp_path / folder).mkdir(parents=True)
    assert set(Root(tmp_path).paths()) == {"proc", "tmp", "usr", "usr/tmp"}
    before = Root(tmp_path).paths("usr")
    (tmp_path / "usr" / "new").write_text("")
    assert set(Root(tmp_path).paths("usr")) - set(before) == {"usr/new"}


def test_a_file_of_a_distribution_goes_with_its_line_of_the_record(tmp_path) -> None:
    (tmp_path / "uv_cache.json").write_text("{}")
    (tmp_path / "RECORD").write_text("a.py,,\nt.dist-info/uv_cache.json,sha256=x,2\nt.dist-info/RECORD,,\n")
    remove_from_distribution(tmp_path, "uv_cache.json")
    assert [file.name for file in tmp_path.iterdir()] == ["RECORD"]
    assert (tmp_path / "RECORD").read_text() == "a.py,,\nt.dist-info/RECORD,,\n"


def test_a_build_without_roots_rights_is_refused_with_what_it_needs(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("sys.argv", ["images", "build", str(tmp_path / "out")])
    assert command.main() == 2
    assert "rights of root" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_archive_of_images_that_were_not_built_is_refused(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["images", "archive", str(tmp_path)])
    assert command.main() == 2
    assert "make images" in capsys.readouterr().err
