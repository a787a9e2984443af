"""The platform repository: one commit that changes one file, on top of others' work, and no word of the token."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.core.base.errors import InputError, RecipeError
from pipelines.promotion.platform_settings import OperatorSettings, PlatformRepository, read_settings
from pipelines.promotion.publish import Change, commit_to_branch, served_bundle
from pipelines.promotion.repository import MAX_FILE_BYTES, BranchFiles, Clone, GitConflict, GitError, Repository
from pipelines.promotion.rules import GitFile, GitTarget
from tests.pipelines.promotion.git_http import git_over_http
from tests.pipelines.promotion.git_server import FILE, PATH, TOKEN, Platform, git

TARGET = GitTarget(repository="platform", path=PATH).naming("nano")
FILE_IN_GIT = GitFile(repository="platform", path=PATH)
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
    [("absent", PATH, "couldn't find remote ref"), ("main", "absent.yaml", "check the path")],
)
def test_a_wrong_branch_or_path_is_named(platform: Platform, branch: str, path: str, words: str) -> None:
    with pytest.raises(GitError, match=words), Repository(platform.settings, branch) as repository:
        repository.read(path)


def test_the_token_reaches_git_by_a_file_alone(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What git asks is answered from the secret; no argument and no variable that git sees has it."""
    seen: list[str] = []
    run = subprocess.run

    def watched(command: list[str], **options: object) -> object:
        seen.append(f"{command} {options.get('env')}")
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", watched)
    monkeypatch.setenv("GIT_SSH_COMMAND", "false")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Repository(platform.settings, "main") as repository:
        commit_to_branch(repository, TARGET, CHANGE)
        monkeypatch.undo()
        (askpass,) = tmp_path.glob("tessera-git-*/askpass")
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


@pytest.fixture(params=["file", "http"])
def settings(request: pytest.FixtureRequest, platform: Platform, tmp_path: Path) -> Iterator[PlatformRepository]:
    """The repository by its path, and over HTTP with a token."""
    if request.param == "file":
        yield platform.settings
        return
    with git_over_http(tmp_path, "oauth2", TOKEN) as url:
        values = {"url": f"{url}/team/platform.git", "host": "gitlab", "credentials": platform.credentials}
        yield PlatformRepository.parse(values)


def test_a_file_is_read_at_the_head_and_fetched_again_only_where_that_has_moved(
    settings: PlatformRepository, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []
    run = subprocess.run

    def watched(command: list[str], **options: object) -> object:
        commands.extend({"fetch", "ls-remote"} & set(command))
        return run(command, **options)  # type: ignore[call-overload]

    files, head = BranchFiles(), git(platform.bare, "rev-parse", "main")
    monkeypatch.setattr(subprocess, "run", watched)
    first = files.read(settings, FILE_IN_GIT)
    assert (first.commit, first.text) == (head, FILE.format(digest=OLD))
    assert files.read(settings, FILE_IN_GIT) == first
    assert commands == ["fetch", "ls-remote"]
    head = platform.change(NEW)
    commands.clear()
    assert files.read(settings, FILE_IN_GIT) == (head, FILE.format(digest=NEW))
    assert commands == ["ls-remote", "fetch"]
    git(platform.bare, "update-ref", "refs/heads/main", first.commit)  # a person takes a commit back by force
    assert files.read(settings, FILE_IN_GIT) == first


def test_one_commit_is_fetched_and_no_other_file(
    settings: PlatformRepository, platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    platform.change("", name="weights.bin", text="x" * 1000)
    with Clone(settings) as clone:
        clone.fetch_branch("main", "--depth=1")
        clone.read(PATH)
        (folder,) = scratch.glob("tessera-git-*")
        kinds = git(folder, "cat-file", "--batch-check", "--batch-all-objects").split()[1::3]
    assert kinds.count("commit") == 1
    assert kinds.count("blob") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"x" * (MAX_FILE_BYTES + 1), "has 1,048,577 bytes, more than 1,048,576"), (b"\xff\xfe", "no UTF-8 text")],
)
def test_a_file_that_is_no_text_or_too_large_is_named(platform: Platform, content: bytes, words: str) -> None:
    (platform.copy / PATH).write_bytes(content)
    git(platform.copy, "commit", "--quiet", "-am", "no recipe")
    git(platform.copy, "push", "--quiet", "origin", "main")
    with pytest.raises(GitError, match=words):
        BranchFiles().read(platform.settings, FILE_IN_GIT)


def test_a_link_is_not_followed(platform: Platform, tmp_path: Path) -> None:
    (secret := tmp_path / "token").write_text("secret")
    (platform.copy / PATH).unlink()
    (platform.copy / PATH).symlink_to(secret)
    git(platform.copy, "commit", "--quiet", "-am", "a link")
    git(platform.copy, "push", "--quiet", "origin", "main")
    assert BranchFiles().read(platform.settings, FILE_IN_GIT).text == str(secret)
