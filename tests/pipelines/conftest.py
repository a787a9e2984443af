"""What the tests of the pipelines share."""

import os
from pathlib import Path

import pytest

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
