"""Requests to merge a branch, at GitHub, GitLab and Gitea (Forgejo has the same interface).

Each needs four calls of a REST interface, which the standard library makes.
"""

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import quote, urlencode

from components.core.base.errors import InputError
from pipelines.promotion.platform_settings import HostKind, PlatformRepository
from pipelines.promotion.repository import GitError

TIMEOUT_S = 60.0
PAGE = 50
MAX_PAGES = 20
RequestState = Literal["open", "merged", "closed"]


@dataclass(frozen=True)
class MergeRequest:
    """A request to merge a branch.

    Attributes:
        number: its number in the repository.
        url: its page.
        state: what has become of it.
    """

    number: int
    url: str
    state: RequestState


class GitHost(Protocol):
    """The server of a repository."""

    def find(self, branch: str, base: str) -> MergeRequest | None:
        """The newest request to merge a branch, whatever its state; None without one."""

    def open(self, branch: str, base: str, title: str, body: str) -> MergeRequest:
        """Open a request.

        Raises:
            GitError: the server refuses.
        """

    def read(self, number: int) -> MergeRequest:
        """A request by its number."""

    def close(self, number: int) -> None:
        """Close a request without merging it."""


def connect_host(repository: PlatformRepository) -> GitHost:
    """The server of a repository.

    Raises:
        InputError: its kind is not known.
    """
    if repository.host is None:
        raise InputError(
            f"the kind of the server of {repository.url} is not known, so no request can be opened there",
            hint=f"set host to one of {', '.join(HOSTS)} in the settings of the repository, or use git.mode: commit",
        )
    return HOSTS[repository.host](repository)


class _PullRequests:
    """What the interfaces of GitHub and Gitea have alike."""

    def __init__(self, api: "_Api", repository: PlatformRepository) -> None:
        self._api, self._pulls = api, f"/repos/{repository.project}/pulls"

    def open(self, branch: str, base: str, title: str, body: str) -> MergeRequest:
        """Create a pull request."""
        values = {"title": title, "head": branch, "base": base, "body": body}
        return _of_pull_request(self._api.call("POST", self._pulls, values))

    def read(self, number: int) -> MergeRequest:
        """Get a pull request."""
        return _of_pull_request(self._api.call("GET", f"{self._pulls}/{number}"))

    def close(self, number: int) -> None:
        """Update a pull request."""
        self._api.call("PATCH", f"{self._pulls}/{number}", {"state": "closed"})


class GitHub(_PullRequests):
    """GitHub's REST interface, version 2022-11-28."""

    def __init__(self, repository: PlatformRepository) -> None:
        headers = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"}
        super().__init__(_Api(repository, headers, "Authorization", "Bearer "), repository)
        self._owner = repository.project.partition("/")[0]

    def find(self, branch: str, base: str) -> MergeRequest | None:
        """List pull requests by their head."""
        query = {
            "head": f"{self._owner}:{branch}",
            "base": base,
            "state": "all",
            "sort": "created",
            "direction": "desc",
        }
        found = self._api.call("GET", self._pulls, query=query)
        return _of_pull_request(found[0]) if found else None


class Gitea(_PullRequests):
    """Gitea's and Forgejo's REST interface, version 1."""

    def __init__(self, repository: PlatformRepository) -> None:
        super().__init__(_Api(repository, {}, "Authorization", "token "), repository)

    def find(self, branch: str, base: str) -> MergeRequest | None:
        """Look through the pull requests, newest first: the list has no filter by branch."""
        for page in range(1, MAX_PAGES + 1):
            query = {"state": "all", "sort": "recentupdate", "limit": str(PAGE), "page": str(page)}
            found = self._api.call("GET", self._pulls, query=query)
            for each in found:
                if each["head"]["ref"] == branch and each["base"]["ref"] == base:
                    return _of_pull_request(each)
            if not found:
                break
        return None


class GitLab:
    """GitLab's REST interface, version 4."""

    def __init__(self, repository: PlatformRepository) -> None:
        self._api = _Api(repository, {}, "PRIVATE-TOKEN", "")
        self._requests = f"/projects/{quote(repository.project, safe='')}/merge_requests"

    def find(self, branch: str, base: str) -> MergeRequest | None:
        """List merge requests by their source branch."""
        query = {
            "source_branch": branch,
            "target_branch": base,
            "state": "all",
            "order_by": "created_at",
            "sort": "desc",
        }
        found = self._api.call("GET", self._requests, query=query)
        return _of_gitlab(found[0]) if found else None

    def open(self, branch: str, base: str, title: str, body: str) -> MergeRequest:
        """Create a merge request."""
        values = {"source_branch": branch, "target_branch": base, "title": title, "description": body}
        return _of_gitlab(self._api.call("POST", self._requests, values))

    def read(self, number: int) -> MergeRequest:
        """Get a merge request."""
        return _of_gitlab(self._api.call("GET", f"{self._requests}/{number}"))

    def close(self, number: int) -> None:
        """Update a merge request."""
        self._api.call("PUT", f"{self._requests}/{number}", {"state_event": "close"})


HOSTS: Mapping[HostKind, type[GitHub] | type[Gitea] | type[GitLab]] = {
    "github": GitHub,
    "gitlab": GitLab,
    "gitea": Gitea,
}


class _Api:
    """Calls of a REST interface with the token of a repository, which is read anew for each: it may be renewed."""

    def __init__(self, repository: PlatformRepository, headers: Mapping[str, str], header: str, prefix: str) -> None:
        self._repository, self._headers, self._header, self._prefix = repository, headers, header, prefix

    def call(
        self, method: str, path: str, values: Mapping[str, str] | None = None, query: Mapping[str, str] | None = None
    ) -> Any:
        """Send a request; returns the answer's JSON.

        Raises:
            GitError: the server does not answer, or refuses.
        """
        url = f"{self._repository.api_url}{path}" + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": "application/json", "User-Agent": "tessera", **self._headers}
        if token := self._repository.token():
            headers[self._header] = f"{self._prefix}{token}"
        data = None
        if values is not None:
            data, headers["Content-Type"] = json.dumps(values).encode(), "application/json"
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with _opener(self._repository).open(request, timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
            hint = "check the token of the repository's secret: it must be allowed to open requests"
            raise GitError(
                f"{method} {url} was answered {error.code}: {said}",
                hint=hint if error.code in (401, 403, 404) else None,
            ) from None
        except (OSError, ValueError) as error:
            raise GitError(f"{method} {url} was not answered: {error}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the token would go to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse."""
        return None


def _opener(repository: PlatformRepository) -> urllib.request.OpenerDirector:
    authority = None if repository.authority is None else str(repository.authority)
    context = ssl.create_default_context(cafile=authority)
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _NoRedirect())


def _of_pull_request(found: Mapping[str, Any]) -> MergeRequest:
    """A pull request by `number`, `html_url`, `state`, and `merged_at` of GitHub or `merged` of Gitea."""
    is_merged = found.get("merged_at") or found.get("merged")
    state: RequestState = "merged" if is_merged else "open" if found["state"] == "open" else "closed"
    return MergeRequest(int(found["number"]), str(found["html_url"]), state)


def _of_gitlab(found: Mapping[str, Any]) -> MergeRequest:
    """A merge request by its documented fields `iid`, `web_url` and `state`; a locked one is about to be merged."""
    states: dict[str, RequestState] = {"merged": "merged", "closed": "closed"}
    return MergeRequest(int(found["iid"]), str(found["web_url"]), states.get(found["state"], "open"))
