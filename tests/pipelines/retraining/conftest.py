"""The cluster of the tests of retrainings."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.core.store.store import open_store
from pipelines.run import submit
from tests.pipelines.promotion.git_server import running_host
from tests.pipelines.retraining.site import Site
from tests.pipelines.retraining.world import World, write_digest
from tests.pipelines.run.fake_kfp import running_kfp


@pytest.fixture
def world(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A cluster with an empty store; its runs go on until a test ends them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TESSERA_LOCAL", str(tmp_path / "local"))
    with running_kfp() as kfp:
        yield World(kfp, open_store(s3_uri))


@pytest.fixture
def site(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(submit, "compile_pipeline", write_digest)
    with running_host("gitea", tmp_path / "git") as (host, platform):
        yield Site(world, platform, host)
