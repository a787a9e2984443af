"""What the tests of the pipelines share."""

import os
from pathlib import Path

import pytest

from components.core.lineage.curves import record_curves
from components.core.store.store import Store, open_store
from tests.pipelines.made_up_run import make_run

ONLY_DATA = """
name: only-data
parent_pretrain: null
search: null
distill: null
pretrain: null
sft: null
rl: null
eval: null
deploy: null
"""
"""A recipe that ends after its first stage."""


@pytest.fixture(scope="session")
def renew_golden() -> bool:
    """Whether files that are generated and kept are to be written anew: `make golden`."""
    return os.environ.get("TESSERA_GOLDEN") == "renew"


@pytest.fixture
def only_data(tmp_path: Path) -> Path:
    """A recipe file with the data stage alone."""
    path = tmp_path / "only-data.yaml"
    path.write_text(ONLY_DATA)
    return path


@pytest.fixture(scope="module")
def made_up_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with one made-up run, `demo-1`, and its curves."""
    store = open_store(tmp_path_factory.mktemp("store"))
    make_run(store)
    record_curves(store, "demo-1")
    return store
