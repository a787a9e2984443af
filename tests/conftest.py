"""A real S3 server, and stores of both kinds, for any test that asks for them; GPU tests only where there is a GPU."""

import gc
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from components.core.base.processes import without_garbage_collection
from components.core.runtime.hardware import UNKNOWN_GPU, gpu_names
from tests.s3_server import S3Server, fresh_prefix, running_server

settings.register_profile("tessera", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tessera")  # a busy machine fails no test


OPT_IN = ("cluster", "kfp", "real")
"""Markers of tests that run only where `-m` asks for them."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all tests without garbage collections, and keep those that follow from what was imported.

    It is millions of objects, which each full collection would walk through.
    """
    with without_garbage_collection():
        collected = yield
        gc.freeze()
        return collected


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that nobody asked for, skip those that need a GPU where there is none, and start the longest.

    A file of tests/e2e takes minutes: as the last one it would leave all processes but its own without work.
    """
    items.sort(key=lambda item: "e2e" not in item.path.parts)
    left_out = [
        item
        for item in items
        for marker in OPT_IN
        if marker not in config.option.markexpr and item.get_closest_marker(marker) is not None
    ]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if marked and gpu_names() == UNKNOWN_GPU:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and nvidia-smi finds none"))


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS, one for each module: after an upload that was broken off it keeps a part of a core busy."""
    with running_server(lambda: tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix, and the environment that opens it."""
    return fresh_prefix(s3_server, monkeypatch)


@pytest.fixture(params=["folder", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    return str(request.getfixturevalue("s3_uri")) if request.param == "s3" else str(tmp_path / "store")
