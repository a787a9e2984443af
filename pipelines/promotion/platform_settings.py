"""Settings of the operator: the repositories that have recipes or name what is served, and the key that signs.

A `Retraining` names a repository. Its address and its credentials are here, where only who installs the operator
writes: a user of the cluster cannot send them to another server.
"""

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from components.core.base.config import Config
from components.core.base.errors import InputError
from components.core.base.suggestions import nearest
from components.core.base.yaml_text import read_yaml

HostKind = Literal["github", "gitlab", "gitea"]
USERNAMES: dict[HostKind, str] = {"github": "x-access-token", "gitlab": "oauth2", "gitea": "tessera"}
"""Names that servers take together with a token."""
API_PATHS: dict[HostKind, str] = {"github": "/api/v3", "gitlab": "/api/v4", "gitea": "/api/v1"}


class PlatformRepository(Config):
    """A repository that names served models, or has recipes."""

    url: str = Field(pattern=r"^(https?://[^/@\s]+|file://)/\S+$")
    """Address, without a user or password in it."""
    host: HostKind | None = None
    """Kind of its server, for requests; Forgejo is a gitea. Without it, commits alone can be made."""
    api: str | None = Field(default=None, pattern=r"^https?://[^/@\s]+(/\S*)?$")
    """Address of the server's API, where it is not at the usual place."""
    credentials: Path | None = None
    """Folder with the file `token`, and where needed `username`, and `ca.crt` of the authority to be trusted."""
    author_name: str = "Tessera"
    """Name of who commits."""
    author_email: str = "tessera@localhost"
    """Address of who commits."""

    @property
    def default_username(self) -> str:
        """The user's name where the credentials have none."""
        return "tessera" if self.host is None else USERNAMES[self.host]

    @property
    def api_url(self) -> str:
        """Address of the API."""
        assert self.host is not None
        parts = urlsplit(self.url)
        if self.api is not None:
            return self.api.rstrip("/")
        if parts.netloc == "github.com":
            return "https://api.github.com"
        return f"{parts.scheme}://{parts.netloc}{API_PATHS[self.host]}"

    @property
    def project(self) -> str:
        """Owner and name of the repository at its server."""
        return urlsplit(self.url).path.strip("/").removesuffix(".git")

    @property
    def authority(self) -> Path | None:
        """Certificate of the authority of the server; None where it is a public one."""
        path = None if self.credentials is None else self.credentials / "ca.crt"
        return path if path is not None and path.is_file() else None

    def token(self) -> str | None:
        """The token, None where there are no credentials.

        Raises:
            InputError: it cannot be read.
        """
        if self.credentials is None:
            return None
        try:
            return (self.credentials / "token").read_text(encoding="utf-8").strip()
        except OSError as error:
            raise InputError(f"no token of {self.url} in {self.credentials}: {error.strerror}") from None


class OperatorSettings(Config):
    """What the operator needs besides its options."""

    repositories: dict[str, PlatformRepository] = Field(default_factory=dict)
    """Repositories by the name that a `Retraining` uses."""
    signing_key: Path | None = None
    """Private key that signs promoted bundles, PEM."""
    alertmanager: str | None = Field(default=None, pattern=r"^https?://[^/@\s]+(/\S*)?$")
    """Address of the Alertmanager whose alerts are triggers."""

    def repository(self, name: str) -> PlatformRepository:
        """A repository by its name.

        Raises:
            InputError: there is none.
        """
        if name not in self.repositories:
            raise InputError(
                f"the operator knows no repository {name!r}",
                hint=nearest(name, list(self.repositories)) or "add it to operator.repositories of the chart",
            )
        return self.repositories[name]


def read_settings(file: Path | None) -> OperatorSettings:
    """The settings in a YAML file; the defaults without one.

    Raises:
        InputError: the file cannot be read or used.
    """
    if file is None:
        return OperatorSettings()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the settings {file} cannot be read: {error.strerror}") from None
    return OperatorSettings.parse(read_yaml(text, str(file)) or {}, where=file.name)
