"""Requests end to end at a real Gitea, whose program the variable TESSERA_TEST_GITEA names; skipped without it."""

import contextlib
import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.core.base.ports import usable_port
from pipelines.promotion.git_hosts import connect_host
from pipelines.promotion.platform_settings import PlatformRepository
from pipelines.promotion.publish import Change, open_request, served_bundle
from pipelines.promotion.repository import Repository
from pipelines.promotion.rules import GitTarget
from tests.pipelines.promotion.git_server import FILE, PATH, git
from tests.waiting import wait_until

TARGET = GitTarget(repository="platform", path=PATH).naming("nano")
OLD, NEW = "a" * 64, "b" * 64
USER = "team"


class Gitea:
    """A running server with one user, and the user's token."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token = url, token

    def call(self, method: str, path: str, **values: Any) -> Any:
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self.url}/api/v1{path}", json.dumps(values).encode(), headers, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(url, timeout=10).close()
        return True
    return False


@pytest.fixture(scope="module")
def gitea(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gitea]:
    program = os.environ.get("TESSERA_TEST_GITEA")
    if program is None:
        pytest.skip("TESSERA_TEST_GITEA names no Gitea")
    folder, port = tmp_path_factory.mktemp("gitea"), usable_port(None)
    url, config = f"http://127.0.0.1:{port}", folder / "app.ini"
    static = os.environ.get("TESSERA_TEST_GITEA_STATIC", str(Path(program).parent))
    config.write_text(
        "I_AM_BEING_UNSAFE_RUNNING_AS_ROOT = true\n"
        f"[server]\nHTTP_ADDR = 127.0.0.1\nHTTP_PORT = {port}\nROOT_URL = {url}/\nOFFLINE_MODE = true\n"
        f"DISABLE_SSH = true\nSTATIC_ROOT_PATH = {static}\n"
        f"[database]\nDB_TYPE = sqlite3\nPATH = {folder}/gitea.db\n"
        "[security]\nINSTALL_LOCK = true\nSECRET_KEY = secret\n[log]\nLEVEL = warn\n"
    )
    environment = os.environ | {"HOME": str(folder), "GITEA_WORK_DIR": str(folder)}
    command = [program, "--config", str(config)]

    def run(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], env=environment, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    run("migrate")
    account = ("--username", USER, "--password", "a-long-Passw0rd", "--email", "team@example.com")
    run("admin", "user", "create", *account, "--admin", "--must-change-password=false")
    token = run("admin", "user", "generate-access-token", "--username", USER, "--scopes", "all", "--raw").split()[-1]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "web"], env=environment, stdout=log, stderr=log)
    try:
        wait_until("Gitea answers", lambda: answers(f"{url}/api/healthz"), interval_s=0.5)
        yield Gitea(url, token)
    finally:
        process.terminate()
        process.wait()


def test_a_request_is_opened_found_merged_and_closed(gitea: Gitea, tmp_path: Path) -> None:
    gitea.call("POST", "/user/repos", name="platform", default_branch="main")
    copy, credentials = tmp_path / "copy", tmp_path / "secret"
    (copy / PATH).parent.mkdir(parents=True)
    credentials.mkdir()
    (credentials / "token").write_text(gitea.token)
    (copy / PATH).write_text(FILE.format(digest=OLD))
    git(copy, "init", "--quiet", "--initial-branch=main")
    git(copy, "add", "-A")
    git(copy, "commit", "--quiet", "-m", "begin")
    address = f"{gitea.url}/{USER}/platform.git"
    git(copy, "push", "--quiet", address.replace("://", f"://{USER}:{gitea.token}@"), "main")
    wait_until("Gitea has seen the push", lambda: not gitea.call("GET", f"/repos/{USER}/platform")["empty"])

    platform = PlatformRepository(url=address, host="gitea", credentials=credentials)
    host, page = connect_host(platform), "## Page\n\n| a | b |\n|---|---|\n| `x` | 1 |\n"
    for branch, do in (("tessera/one", "merge"), ("tessera/two", "close")):
        old, new = (OLD, NEW) if do == "merge" else (NEW, OLD)
        change = Change(old, new, f"Tessera-Bundle: {new}", "Serve nano", page)
        with Repository(platform, "main") as repository:
            opened = open_request(repository, platform, TARGET, change, branch)
            assert open_request(repository, platform, TARGET, change, branch) == opened
        assert opened.state == "open"
        assert gitea.call("GET", f"/repos/{USER}/platform/pulls/{opened.number}")["body"] == page
        if do == "merge":
            gitea.call("POST", f"/repos/{USER}/platform/pulls/{opened.number}/merge", Do="merge")
        else:
            host.close(opened.number)
        assert host.read(opened.number).state == ("merged" if do == "merge" else "closed")
        assert host.find(branch, "main") == host.read(opened.number)
    with Repository(platform, "main") as repository:
        assert served_bundle(repository, TARGET) == NEW
        assert repository.find_commit(f"Tessera-Bundle: {NEW}") is not None
