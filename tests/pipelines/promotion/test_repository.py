"""The platform repository: one commit that changes one file, on top of others' work, and no word of the token."""

import os
import subprocess
from pathlib import Path

import pytest

from components.core.base.errors import InputError, RecipeError
from pipelines.promotion.platform_settings import OperatorSettings, PlatformRepository, read_settings
from pipelines.promotion.publish import Change, commit_to_branch, served_bundle
from pipelines.promotion.repository import GitConflict, GitError, Repository
from pipelines.promotion.rules import GitTarget
from tests.pipelines.promotion.git_http import git_over_http
from tests.pipelines.promotion.git_server import PATH, TOKEN, Platform, git

TARGET = GitTarget(repository="platform", path=PATH)
OLD, NEW = "a" * 64, "b" * 64
CHANGE = Change(OLD, NEW, f"Tessera-Bundle: {NEW}", "Serve nano", "page")


@pytest.fixture
def platform(tmp_path: Path) -> Platform:
    found = Platform(tmp_path)
    found.change(OLD)
    return found


def test_one_commit_changes_one_line_and_keeps_what_others_have_done(platform: Platform) -> None:
    before = platform.read()
    with Repository(platform.settings, "main") as repository:
        assert served_bundle(repository, TARGET) == OLD
        commit = commit_to_branch(repository, TARGET, CHANGE)
    assert platform.read() == before.replace(OLD, NEW)
    assert platform.commits() == ["Serve nano", f"change {PATH}", "change README"]
    assert git(platform.bare, "diff", "--stat", "--format=", f"{commit}^", commit).count("|") == 1
    assert git(platform.bare, "log", "-1", "--format=%an <%ae>", commit) == "Tessera <tessera@localhost>"
    with Repository(platform.settings, "main") as repository:
        assert repository.find_commit(f"Tessera-Bundle: {NEW}") == commit
        assert repository.find_commit(f"Tessera-Bundle: {NEW[:12]}") is None
        assert repository.branch_head("main") == commit
        assert repository.branch_head("other") is None


def test_where_others_were_faster_the_commit_is_made_on_top_of_theirs(platform: Platform) -> None:
    with Repository(platform.settings, "main") as repository:
        others = platform.change("", name="serving/other.yaml")
        commit = commit_to_branch(repository, TARGET, CHANGE)
    assert git(platform.bare, "rev-parse", f"{commit}^") == others
    assert platform.commits()[:2] == ["Serve nano", "change serving/other.yaml"]


def test_where_others_serve_another_bundle_nothing_is_pushed(platform: Platform) -> None:
    with Repository(platform.settings, "main") as repository:
        platform.change("c" * 64)
        with pytest.raises(GitConflict, match="names cccccccccccc now, and no more aaaaaaaaaaaa"):
            commit_to_branch(repository, TARGET, CHANGE)
    assert platform.commits()[0] == f"change {PATH}"


def test_a_second_race_is_a_conflict_and_nothing_is_forced(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    push = Repository.push

    def faster_than(self: Repository, commit: str, branch: str) -> None:
        platform.change("", name=f"serving/{commit}.yaml")
        push(self, commit, branch)

    monkeypatch.setattr(Repository, "push", faster_than)
    with (
        Repository(platform.settings, "main") as repository,
        pytest.raises(GitConflict, match="other commits meanwhile"),
    ):
        commit_to_branch(repository, TARGET, CHANGE)
    assert "Serve nano" not in platform.commits()
    assert len(platform.commits()) == 4


def test_a_hook_of_the_server_that_refuses_is_an_error_and_no_conflict(platform: Platform) -> None:
    hook = platform.bare / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho main is protected >&2\nexit 1\n")
    hook.chmod(0o755)
    with (
        Repository(platform.settings, "main") as repository,
        pytest.raises(GitError, match="main is protected") as error,
    ):
        commit_to_branch(repository, TARGET, CHANGE)
    assert not isinstance(error.value, GitConflict)


@pytest.mark.parametrize(
    ("branch", "path", "words"),
    [("absent", PATH, "couldn't find remote ref"), ("main", "absent.yaml", "check git.path")],
)
def test_a_wrong_branch_or_path_is_named(platform: Platform, branch: str, path: str, words: str) -> None:
    with pytest.raises(GitError, match=words), Repository(platform.settings, branch) as repository:
        repository.read(path)


def test_the_token_reaches_git_by_a_file_alone(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """What git asks is answered from the secret; no argument and no variable that git sees has it."""
    seen: list[str] = []
    run = subprocess.run

    def watched(command: list[str], **options: object) -> object:
        seen.append(f"{command} {options.get('env')}")
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", watched)
    monkeypatch.setenv("GIT_SSH_COMMAND", "false")
    with Repository(platform.settings, "main") as repository:
        commit_to_branch(repository, TARGET, CHANGE)
        monkeypatch.undo()
        askpass = next(Path(os.environ.get("TMPDIR", "/tmp")).glob("tessera-git-*/askpass"))
        environment = {"PATH": os.environ["PATH"], "TESSERA_CREDENTIALS": str(platform.credentials)}
        asked = subprocess.run([askpass, "Password:"], env=environment, capture_output=True, text=True, check=True)
        assert asked.stdout.strip() == TOKEN
    assert seen
    assert not any(TOKEN in text or "GIT_SSH_COMMAND" in text for text in seen)


def test_over_http_the_server_gets_the_token_and_a_wrong_one_is_named(platform: Platform, tmp_path: Path) -> None:
    git(platform.bare, "config", "http.receivepack", "true")
    with git_over_http(tmp_path, "oauth2", TOKEN) as url:
        values = {"url": f"{url}/team/platform.git", "host": "gitlab", "credentials": platform.credentials}
        settings = PlatformRepository.parse(values)
        with Repository(settings, "main") as repository:
            commit = commit_to_branch(repository, TARGET, CHANGE)
        assert git(platform.bare, "rev-parse", "main") == commit
        (platform.credentials / "token").write_text("another")
        with (
            pytest.raises(GitError, match=r"Authentication failed(.|\n)*check the token"),
            Repository(settings, "main"),
        ):
            pass


def test_settings_are_read_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("repositories: {platform: {url: https://gitlab.example.com/a/b/c.git, host: gitlab}}\n")
    settings = read_settings(file)
    assert settings.repository("platform").api_url == "https://gitlab.example.com/api/v4"
    assert settings.repository("platform").project == "a/b/c"
    with pytest.raises(InputError, match=r"no repository 'platfrom'.*\n.*platform"):
        settings.repository("platfrom")
    assert PlatformRepository(url="https://github.com/a/b", host="github").api_url == "https://api.github.com"
    assert read_settings(None) == OperatorSettings()
    file.write_text("repositories: {platform: {url: 'https://user:word@example.com/a/b'}}\n")
    with pytest.raises(RecipeError, match=r"repositories\.platform\.url"):
        read_settings(file)
