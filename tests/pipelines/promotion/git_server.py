"""Bare repositories of real git, and a server that stands in for the REST interfaces of three hosts.

The stand-in refuses a request that the published interface does not take: an unknown or missing field, a parameter that
does not exist, no token. What it knows of each interface was written down from the published descriptions (GitHub's
REST description of version 2022-11-28, GitLab's of version 4, Gitea's Swagger of version 1). Only a real server shows
that it takes them.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema  # type: ignore[import-untyped]

from pipelines.promotion.platform_settings import HostKind, PlatformRepository
from tests.json_server import Request, running_json_server

TOKEN = "a-token"
PATH = "serving/nano.yaml"
FILE = f"""# what is served
serving:
  gateway:
    name: public
  models:
    nano:
      canary:
        problems: {"c" * 64}
      digest: "{{digest}}"  # a bundle
"""
"""Values of the chart, without a digest yet."""


def git(folder: Path, *arguments: str) -> str:
    """Run git as somebody else than the operator."""
    who = ["-c", "user.name=Person", "-c", "user.email=person@example.com"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@dataclass
class Platform:
    """A platform repository with one file, and a person's working copy of it."""

    folder: Path
    host: HostKind | None = None
    api: str | None = None

    def __post_init__(self) -> None:
        self.bare, self.copy, self.credentials = (
            self.folder / name for name in ("team/platform.git", "copy", "secret")
        )
        self.bare.mkdir(parents=True)
        self.credentials.mkdir()
        (self.credentials / "token").write_text(TOKEN + "\n")
        git(self.bare, "init", "--quiet", "--bare", "--initial-branch=main")
        git(self.bare, "config", "uploadpack.allowFilter", "true")
        git(self.folder, "clone", "--quiet", str(self.bare), "copy")
        self.change("", name="README", text="a platform\n")

    @property
    def settings(self) -> PlatformRepository:
        return PlatformRepository(url=f"file://{self.bare}", host=self.host, api=self.api, credentials=self.credentials)

    def change(self, digest: str, *, name: str = PATH, text: str = FILE, push: bool = True) -> str:
        """A person's commit to the branch."""
        git(self.copy, "checkout", "--quiet", "-B", "main")
        with contextlib.suppress(subprocess.CalledProcessError):
            git(self.copy, "pull", "--quiet", "--rebase", "origin", "main")
        path = self.copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(digest=digest))
        git(self.copy, "add", "-A")
        git(self.copy, "commit", "--quiet", "-m", f"change {name}")
        if push:
            git(self.copy, "push", "--quiet", "origin", "main")
        return git(self.copy, "rev-parse", "HEAD")

    def read(self, branch: str = "main", path: str = PATH) -> str:
        return git(self.bare, "show", f"{branch}:{path}")

    def commits(self, branch: str = "main") -> list[str]:
        """Subjects of the commits of a branch, newest first."""
        return git(self.bare, "log", "--format=%s", branch).splitlines()

    def branches(self) -> list[str]:
        return git(self.bare, "for-each-ref", "--format=%(refname:short)", "refs/heads").splitlines()

    def merge(self, branch: str) -> None:
        """Merge a branch as a host does."""
        git(self.copy, "fetch", "--quiet", "origin")
        git(self.copy, "checkout", "--quiet", "-B", "main", "origin/main")
        git(self.copy, "merge", "--quiet", "--no-ff", "-m", f"merge {branch}", f"origin/{branch}")
        git(self.copy, "push", "--quiet", "origin", "main")


TEXT = {"type": "string"}
FLAG = {"type": "boolean"}


def _body(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


@dataclass(frozen=True)
class Interface:
    """What a published interface says about requests to merge."""

    path: str
    """Of the list of requests."""
    header: str
    """Header of the token; its value ends with the token."""
    parameters: frozenset[str]
    """Parameters of the list."""
    body: Mapping[str, Any]
    """JSON schema of the body that creates one."""
    branch: str
    """Field of that body with the branch."""
    close: tuple[str, dict[str, str]] = ("PATCH", {"state": "closed"})
    """Method and body that close one."""


INTERFACES: dict[HostKind, Interface] = {
    "github": Interface(
        "/repos/{project}/pulls",
        "Bearer ",
        frozenset({"state", "head", "base", "sort", "direction", "per_page", "page"}),
        _body(
            ("head", "base"),
            **dict.fromkeys(("title", "head", "base", "body", "head_repo"), TEXT),
            **dict.fromkeys(("draft", "maintainer_can_modify"), FLAG),
            issue={"type": "integer"},
        ),
        "head",
    ),
    "gitea": Interface(
        "/repos/{project}/pulls",
        "token ",
        frozenset({"state", "sort", "milestone", "labels", "poster", "page", "limit", "base_branch"}),
        _body(
            (),
            **dict.fromkeys(("title", "head", "base", "body", "assignee", "due_date"), TEXT),
            **{key: {"type": "array", "items": TEXT} for key in ("assignees", "reviewers", "team_reviewers")},
            labels={"type": "array", "items": {"type": "integer"}},
            milestone={"type": "integer"},
        ),
        "head",
    ),
    "gitlab": Interface(
        "/projects/{quoted_project}/merge_requests",
        "",
        frozenset({"source_branch", "target_branch", "state", "order_by", "sort", "page", "per_page", "search", "in"}),
        _body(
            ("source_branch", "target_branch", "title"),
            **dict.fromkeys(("source_branch", "target_branch", "title", "description", "labels"), TEXT),
            **dict.fromkeys(("remove_source_branch", "squash", "allow_collaboration"), FLAG),
            **{key: {"type": "integer"} for key in ("assignee_id", "target_project_id", "milestone_id")},
        ),
        "source_branch",
        ("PUT", {"state_event": "close"}),
    ),
}


@dataclass
class FakeHost:
    """The stand-in: its requests, and what a person does with them."""

    kind: HostKind
    project: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    refuse: int | None = None

    def answer(self, request: Request) -> tuple[int, Any]:
        """Answer a call, or refuse it as the interface does."""
        interface = INTERFACES[self.kind]
        list_path = interface.path.format(project=self.project, quoted_project=quote(self.project, safe=""))
        if self.refuse is not None:
            return self.refuse, {"message": "refused on purpose"}
        if request.authorization != f"{interface.header}{TOKEN}":
            return 401, {"message": "no token"}
        if request.path == list_path and request.method == "GET":
            return self._list(request, interface)
        if request.path == list_path and request.method == "POST":
            return self._create(request, interface)
        number = request.path.removeprefix(f"{list_path}/")
        if number.isdigit() and int(number) <= len(self.requests):
            found = self.requests[int(number) - 1]
            if request.method == interface.close[0] and json.loads(request.body) == interface.close[1]:
                found["state"] = "closed"
            elif request.method != "GET":
                return 422, {"message": f"no {request.method} with {request.body!r}"}
            return 200, self._shown(found)
        return 404, {"message": f"no {request.method} {request.path}"}

    def _list(self, request: Request, interface: Interface) -> tuple[int, Any]:
        if unknown := request.query.keys() - interface.parameters:
            return 422, {"message": f"no parameters {sorted(unknown)}"}
        head = request.query.get("head", "").partition(":")[2] or request.query.get("source_branch")
        if self.kind == "gitea":
            page, limit = int(request.query["page"]), int(request.query["limit"])
            return 200, [self._shown(each) for each in self.requests[::-1][(page - 1) * limit : page * limit]]
        return 200, [self._shown(each) for each in self.requests[::-1] if each["branch"] == head]

    def _create(self, request: Request, interface: Interface) -> tuple[int, Any]:
        values = json.loads(request.body)
        if request.content_type != "application/json":
            return 415, {"message": "not JSON"}
        try:
            jsonschema.validate(values, interface.body)
        except jsonschema.ValidationError as error:
            return 422, {"message": error.message}
        branch = values[interface.branch]
        if any(each["branch"] == branch and each["state"] == "open" for each in self.requests):
            return 409, {"message": "there is one"}
        body = values.get("body") or values.get("description")
        made = {"number": len(self.requests) + 1, "branch": branch, "state": "open", "title": values["title"]}
        self.requests.append(made | {"body": body, "base": values.get("base") or values.get("target_branch")})
        return 201, self._shown(self.requests[-1])

    def _shown(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """A request with the fields that the interface documents."""
        number, state = found["number"], found["state"]
        address = f"https://example.com/team/platform/{number}"
        if self.kind == "gitlab":
            states = {"open": "opened"}
            return {"iid": number, "id": 1000 + number, "web_url": address, "state": states.get(state, state)}
        shown: dict[str, Any] = {
            "number": number,
            "html_url": address,
            "state": "open" if state == "open" else "closed",
        }
        shown |= {"head": {"ref": found["branch"]}, "base": {"ref": found["base"]}}
        if self.kind == "gitea":
            return shown | {"merged": state == "merged"}
        return shown | {"merged_at": "2026-03-02T12:00:00Z" if state == "merged" else None}


@contextlib.contextmanager
def running_host(kind: HostKind, folder: Path) -> Iterator[tuple[FakeHost, Platform]]:
    """A stand-in of a host, and a repository there."""
    host = FakeHost(kind)
    with running_json_server(lambda request: host.answer(request)) as url:
        platform = Platform(folder, kind, url)
        host.project = platform.settings.project
        yield host, platform
