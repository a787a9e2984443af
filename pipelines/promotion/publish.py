"""A change of the served bundle in Git: a commit to the branch that the cluster follows, or a request to merge one."""

from typing import NamedTuple

from pipelines.promotion.git_hosts import MergeRequest, connect_host
from pipelines.promotion.platform_settings import PlatformRepository
from pipelines.promotion.repository import GitConflict, Repository
from pipelines.promotion.rules import GitTarget
from pipelines.promotion.served_file import read_value, replace_value


class Change(NamedTuple):
    """A change of the served bundle.

    Attributes:
        old: digest that the file must have before; empty for none.
        new: digest after it.
        line: line of the message by which the commit is found again.
        title: first line of the message, and title of the request.
        body: body of the request.
    """

    old: str
    new: str
    line: str
    title: str
    body: str


def commit_to_branch(repository: Repository, git: GitTarget, change: Change) -> str:
    """Push one commit to the branch that the cluster follows; returns its id.

    Where others were faster, the commit is made once more on top of theirs.

    Raises:
        GitConflict: others were faster again, or the file names another bundle now.
        GitError: the server refuses.
    """
    commit = _commit(repository, git, change)
    try:
        repository.push(commit, git.branch)
    except GitConflict:
        repository.fetch()
        commit = _commit(repository, git, change)
        repository.push(commit, git.branch)
    return commit


def open_request(
    repository: Repository, platform: PlatformRepository, git: GitTarget, change: Change, branch: str
) -> MergeRequest:
    """Push a branch with one commit, and open a request for it; what is there already is taken.

    Raises:
        GitError: the server refuses.
    """
    host = connect_host(platform)
    request = host.find(branch, git.branch)
    if request is not None:
        return request
    if repository.branch_head(branch) is None:
        repository.push(_commit(repository, git, change), branch)
    return host.open(branch, git.branch, change.title, change.body)


def served_bundle(repository: Repository, git: GitTarget) -> str:
    """Digest of the bundle that the file names; empty for none."""
    return read_value(repository.read(git.path), git.key, git.path)


def _commit(repository: Repository, git: GitTarget, change: Change) -> str:
    """One commit on top of the branch that replaces the digest.

    Raises:
        GitConflict: the file names another bundle than before.
    """
    text = repository.read(git.path)
    found = read_value(text, git.key, git.path)
    if found != change.old:
        raise GitConflict(f"{git.path} names {found[:12] or 'no bundle'} now, and no more {change.old[:12] or 'none'}")
    changed = replace_value(text, git.key, change.new, git.path)
    return repository.commit(git.path, changed, f"{change.title}\n\n{change.line}\n")
