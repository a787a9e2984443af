"""What the tests of the chart share."""

import functools
import os
import pickle

import pytest

from infra.chart import render
from tests.helm.cases import CASES, NAMESPACE, Object


@pytest.fixture(params=CASES)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    """What an install would apply, with the defaults, with each example and with all parts."""
    found: list[Object] = pickle.loads(_rendered(request.param))
    return found


@functools.cache
def _rendered(case: str) -> bytes:
    """The objects of a case, of which each test gets a copy."""
    return pickle.dumps(render(CASES[case], namespace=NAMESPACE))


@pytest.fixture(scope="session")
def renew_golden() -> bool:
    """Whether files that are generated and kept are to be written anew: `make golden`."""
    return os.environ.get("TESSERA_GOLDEN") == "renew"
