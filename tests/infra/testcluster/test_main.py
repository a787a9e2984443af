import os
import sys
from pathlib import Path

import pytest

from infra.testcluster.__main__ import main


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_TESTCLUSTER", str(tmp_path / "c"))


def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it refuses to work."""
    monkeypatch.setattr(sys, "argv", ["testcluster", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_user_who_is_not_root_is_told_why_root_is_needed(monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "run it as root" in error(monkeypatch, capsys, "up")


def test_debian_packages_that_are_missing_are_named(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install" in (text := error(monkeypatch, capsys, "up"))
    assert "util-linux" in text


def test_a_command_inside_needs_a_cluster(monkeypatch, capsys) -> None:
    assert "make cluster-up" in error(monkeypatch, capsys, "exec", "kubectl", "get", "-A", "pods")


def test_nothing_is_written_by_a_refusal(monkeypatch, capsys, tmp_path: Path) -> None:
    error(monkeypatch, capsys, "exec", "true")
    assert not (tmp_path / "c").exists()
