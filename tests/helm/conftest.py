"""What the tests of the chart share."""

import os

import pytest

from infra.chart import render
from tests.helm.cases import CASES, NAMESPACE, Object


@pytest.fixture(params=CASES)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    """What an install would apply, with the defaults, with each example and with all parts."""
    return render(CASES[request.param], namespace=NAMESPACE)


@pytest.fixture(scope="session")
def renew_golden() -> bool:
    """Whether files that are generated and kept are to be written anew: `make golden`."""
    return os.environ.get("TESSERA_GOLDEN") == "renew"
