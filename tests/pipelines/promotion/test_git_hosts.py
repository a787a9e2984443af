"""Requests at the three hosts, against a stand-in that refuses what their published interfaces do not take.

No real GitHub, GitLab or Gitea is asked here; `test_gitea.py` asks a real Gitea where there is one.
"""

from pathlib import Path

import pytest

from components.core.base.errors import InputError
from pipelines.promotion import git_hosts
from pipelines.promotion.git_hosts import MergeRequest, connect_host
from pipelines.promotion.platform_settings import HostKind
from pipelines.promotion.repository import GitError
from tests.pipelines.promotion.git_server import TOKEN, Platform, running_host

KINDS: tuple[HostKind, ...] = ("github", "gitlab", "gitea")


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_opened_found_again_and_followed(kind: HostKind, tmp_path: Path) -> None:
    with running_host(kind, tmp_path) as (fake, platform):
        host = connect_host(platform.settings)
        assert host.find("tessera/a", "main") is None
        page = "| a page | with `code` |\n"
        opened = host.open("tessera/a", "main", "Serve nano", page)
        assert (opened.number, opened.state) == (1, "open")
        assert (fake.requests[0]["title"], fake.requests[0]["body"]) == ("Serve nano", page)
        second = host.open("tessera/b", "main", "Serve another", "")
        host.close(second.number)
        assert host.read(second.number).state == "closed"
        assert host.find("tessera/a", "main") == opened
        for state in ("merged", "closed"):
            fake.requests[0]["state"] = state
            assert host.read(1) == MergeRequest(1, opened.url, state)  # type: ignore[arg-type]
            assert host.find("tessera/a", "main") == host.read(1)


def test_a_request_is_found_on_a_later_page_of_gitea(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_hosts, "PAGE", 2)
    with running_host("gitea", tmp_path) as (_, platform):
        host = connect_host(platform.settings)
        for number in range(4):
            host.open(f"tessera/{number}", "main", "Serve nano", "")
        found = host.find("tessera/0", "main")
        assert found is not None
        assert found.number == 1
        assert host.find("tessera/none", "main") is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_has_the_words_of_the_server_and_no_token(kind: HostKind, tmp_path: Path) -> None:
    with running_host(kind, tmp_path) as (fake, platform):
        (platform.credentials / "token").write_text("another")
        with pytest.raises(GitError, match=r"answered 401.*no token.*\n.*allowed to open requests") as error:
            connect_host(platform.settings).find("tessera/a", "main")
        assert "another" not in str(error.value)
        (platform.credentials / "token").write_text(TOKEN)  # a renewed token is read without a restart
        assert connect_host(platform.settings).find("tessera/a", "main") is None
        fake.refuse = 503
        with pytest.raises(GitError, match=r"answered 503: .*refused on purpose"):
            connect_host(platform.settings).open("tessera/a", "main", "t", "b")


def test_without_the_kind_of_the_server_commits_alone_can_be_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no request can be opened there\n.*github, gitlab, gitea"):
        connect_host(Platform(tmp_path).settings)


def test_a_missing_token_is_named(tmp_path: Path) -> None:
    with running_host("gitea", tmp_path) as (_, platform):
        (platform.credentials / "token").unlink()
        with pytest.raises(InputError, match="no token of file:"):
            connect_host(platform.settings).read(1)
