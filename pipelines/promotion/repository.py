"""A platform repository, through the `git` command: a file is read, or changed by one commit on top of a branch.

A clone is bare and without file contents, of which only those that are read are fetched. Nothing is ever forced.
Credentials are files of a mounted secret, `token` and optionally `username`: git asks a script for them that reads the
files, so that they are in no argument, no URL, no configuration and no log.
"""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

from components.core.base.errors import TesseraError
from pipelines.promotion.platform_settings import PlatformRepository
from pipelines.promotion.rules import GitFile

TIMEOUT_S = 300.0
MAX_FILE_BYTES = 1 << 20
"""Largest file that is read, bytes; a config map cannot be larger either."""
BASE = "refs/heads/base"
"""Where the clone has the branch that the cluster follows."""
SETTINGS = {
    "core.hooksPath": "/dev/null",
    "credential.helper": "",
    "gc.auto": "0",
    "http.lowSpeedLimit": "100",
    "http.lowSpeedTime": "60",
    "advice.fetchShowForcedUpdates": "false",
}
ASKPASS = """#!/bin/sh
case "$1" in
Username*) cat "$TESSERA_CREDENTIALS/username" 2>/dev/null || printf %s "$TESSERA_USERNAME" ;;
*) cat "$TESSERA_CREDENTIALS/token" ;;
esac
"""
PASSED_ON = ("PATH", "http_proxy", "https_proxy", "no_proxy", "HTTPS_PROXY", "NO_PROXY")
"""Environment variables that git gets; all others could change what it does."""


class GitError(TesseraError):
    """A platform repository or its server cannot be used, or refuses."""


class GitConflict(GitError):
    """Somebody else has changed the branch, or the value, meanwhile."""


class Clone:
    """An empty clone, in a folder that goes with it.

    Args:
        platform: where the repository is, and who commits.
    """

    def __init__(self, platform: PlatformRepository) -> None:
        self._platform = platform
        self._scratch = tempfile.TemporaryDirectory(prefix="tessera-git-", ignore_cleanup_errors=True)
        self._folder = Path(self._scratch.name)
        askpass = self._folder / "askpass"
        askpass.write_text(ASKPASS, encoding="utf-8")
        askpass.chmod(0o700)

    def __enter__(self) -> Self:
        try:
            self._git("init", "--quiet", "--bare", ".")
            self._git("remote", "add", "origin", self._platform.url)
        except BaseException:
            self._scratch.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()

    def branch_head(self, branch: str) -> str | None:
        """The commit that a branch of the server points at; None where it has no such branch."""
        found = self._git("ls-remote", "origin", f"refs/heads/{branch}").split()
        return found[0] if found else None

    def fetch_branch(self, branch: str, *options: str) -> str:
        """Bring a branch up to date, without contents of files; returns its newest commit.

        Raises:
            GitError: the repository cannot be read, or has no such branch.
        """
        refs = f"+refs/heads/{branch}:{BASE}"
        self._git("fetch", "--quiet", "--no-tags", "--filter=blob:none", *options, "origin", refs)
        return self._git("rev-parse", BASE)

    def read(self, path: str) -> str:
        """A file of the branch.

        Raises:
            GitError: the branch has no such file, or it is too large.
        """
        size = int(self._git("cat-file", "-s", f"{BASE}:{path}"))
        if size > MAX_FILE_BYTES:
            raise GitError(f"{self._platform.url}: {path} has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
        return self._git("cat-file", "blob", f"{BASE}:{path}")

    def _git(self, *arguments: str, stdin: str | None = None, environment: Mapping[str, str] | None = None) -> str:
        """Run git in the clone; returns what it prints."""
        settings = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        try:
            done = subprocess.run(
                ["git", *settings, *arguments],
                cwd=self._folder,
                env=self._environment() | dict(environment or {}),
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                encoding="utf-8",
                timeout=TIMEOUT_S,
            )
        except FileNotFoundError:
            raise GitError("there is no command git", hint="install git") from None
        except subprocess.TimeoutExpired:
            raise GitError(f"{self._platform.url}: git {arguments[0]} took longer than {TIMEOUT_S:g} s") from None
        except UnicodeDecodeError:
            raise GitError(f"{self._platform.url}: git {arguments[0]} has printed what is no UTF-8 text") from None
        if done.returncode:
            lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
            said = "; ".join(line.strip() for line in lines if line.strip())[:500]
            raise GitError(f"{self._platform.url}: git {arguments[0]} failed: {said}", hint=_hint(said))
        return done.stdout if arguments[0] == "cat-file" else done.stdout.strip()

    def _environment(self) -> dict[str, str]:
        own = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        platform = self._platform
        own |= {
            "HOME": str(self._folder),
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": str(self._folder / "askpass"),
            "GIT_ALLOW_PROTOCOL": "https:http:file",
            "TESSERA_USERNAME": platform.default_username,
            **{f"GIT_{who}_NAME": platform.author_name for who in ("AUTHOR", "COMMITTER")},
            **{f"GIT_{who}_EMAIL": platform.author_email for who in ("AUTHOR", "COMMITTER")},
        }
        if platform.credentials is not None:
            own["TESSERA_CREDENTIALS"] = str(platform.credentials)
        if platform.authority is not None:
            own["GIT_SSL_CAINFO"] = str(platform.authority)
        return own


class Repository(Clone):
    """A clone of one branch with its history.

    Args:
        platform: where the repository is, and who commits.
        branch: the branch that the cluster follows.
    """

    def __init__(self, platform: PlatformRepository, branch: str) -> None:
        super().__init__(platform)
        self._branch = branch

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.fetch()
        except BaseException:
            self._scratch.cleanup()
            raise
        return self

    def fetch(self) -> None:
        """Bring the branch up to date.

        Raises:
            GitError: the repository cannot be read, or has no such branch.
        """
        self.fetch_branch(self._branch)

    def find_commit(self, line: str) -> str | None:
        """The newest commit of the branch whose message has a line; None without one."""
        found = self._git("log", "--fixed-strings", f"--grep={line}", "--format=%H%n%B%x00", BASE)
        for entry in found.split("\0"):
            commit, *message = entry.strip().splitlines() or [""]
            if line in message:
                return commit
        return None

    def commit(self, path: str, text: str, message: str) -> str:
        """Write a commit on top of the branch that changes one file; returns its id. Nothing is pushed yet."""
        entry = self._git("ls-tree", BASE, "--", path).split()
        blob = self._git("hash-object", "-w", "--stdin", stdin=text)
        index = {"GIT_INDEX_FILE": str(self._folder / "index")}
        self._git("read-tree", BASE, environment=index)
        self._git("update-index", "--add", "--cacheinfo", f"{entry[0]},{blob},{path}", environment=index)
        tree = self._git("write-tree", "--missing-ok", environment=index)
        return self._git("commit-tree", tree, "-p", BASE, "-F", "-", stdin=message)

    def push(self, commit: str, branch: str) -> None:
        """Push a commit to a branch, which is created where it is absent.

        Raises:
            GitConflict: the branch has commits that this one is not on top of.
            GitError: the server refuses.
        """
        try:
            self._git("push", "--quiet", "--porcelain", "origin", f"{commit}:refs/heads/{branch}")
        except GitError as error:
            words = ("[rejected]", "non-fast-forward", "fetch first", "cannot lock ref")
            if any(word in str(error) for word in words):
                raise GitConflict(
                    f"{self._platform.url}: the branch {branch} has got other commits meanwhile",
                    hint="it is tried again on top of them",
                ) from None
            raise


class FileVersion(NamedTuple):
    """A file at the head of a branch.

    Attributes:
        commit: the head.
        text: what the file has there.
    """

    commit: str
    text: str


class BranchFiles:
    """Files at the heads of branches.

    Each reading asks the server for the head; contents are fetched where it has moved, by one commit without history.
    """

    def __init__(self) -> None:
        self._read: dict[tuple[str, str, str], FileVersion] = {}
        """By the address of the repository, branch and path."""

    def read(self, platform: PlatformRepository, file: GitFile) -> FileVersion:
        """A file as it is now.

        Raises:
            GitError: the repository cannot be read, or has no such branch or file.
        """
        key = platform.url, file.branch, file.path
        with Clone(platform) as clone:
            known = self._read.get(key)
            if known is None or known.commit != clone.branch_head(file.branch):
                commit = clone.fetch_branch(file.branch, "--depth=1")
                known = self._read[key] = FileVersion(commit, clone.read(file.path))
        return known


def _hint(said: str) -> str | None:
    """The way out of an error of git."""
    if "Authentication failed" in said or "could not read" in said or "403" in said:
        return "check the token of the repository's secret: it must be allowed to read and to push"
    if "couldn't find remote ref" in said:
        return "check the branch"
    if "does not exist in" in said or "path '" in said:
        return "check the path"
    return None
