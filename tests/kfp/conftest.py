"""A Kubeflow Pipelines whose pods run this project: `make test-kfp`, with the variables that `tessera submit` reads.

TESSERA_KFP is its address, TESSERA_NAMESPACE the namespace of its pods, TESSERA_STORE an object store that pods and
this machine open. The namespace has the chart's config map and secret, and TESSERA_IMAGES names images that its nodes
have. KUBECONFIG opens the cluster to the tests that end pods.
"""

import os
import time
import uuid
import warnings
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from kubernetes import dynamic

from pipelines.run.kfp_server import KfpServer
from tests.cluster.api import Cluster
from tests.cluster.conftest import api  # noqa: F401  a fixture
from tests.kfp.ml_metadata import MlMetadata

NEEDED = ("TESSERA_KFP", "TESSERA_NAMESPACE", "TESSERA_STORE")
METADATA_PORT = 8080
"""Port of the service metadata-grpc-service."""
PATIENCE_S = 300.0


@pytest.fixture(scope="session", autouse=True)
def settings() -> dict[str, str]:
    """The variables that say where everything is."""
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        pytest.fail(f"{', '.join(missing)} are not set: TESSERA_STORE=s3://… make test-kfp KFP=http://… NAMESPACE=…")
    return {name: os.environ[name] for name in NEEDED}


@pytest.fixture(scope="session")
def new_store(settings: dict[str, str]) -> Callable[[], str]:
    """Makes addresses of empty stores."""
    return lambda: f"{settings['TESSERA_STORE'].rstrip('/')}/test-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def server(settings: dict[str, str]) -> KfpServer:
    """The server, as the command sees it."""
    return KfpServer(settings["TESSERA_KFP"], settings["TESSERA_NAMESPACE"])


@pytest.fixture(scope="session")
def client(settings: dict[str, str]) -> Any:
    """KFP's own client."""
    import kfp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kfp.Client(host=settings["TESSERA_KFP"])


@pytest.fixture(scope="session")
def metadata(settings: dict[str, str]) -> MlMetadata:
    """ML Metadata, on the host of KFP unless TESSERA_TEST_METADATA says otherwise."""
    host = urlsplit(settings["TESSERA_KFP"]).hostname
    return MlMetadata(os.environ.get("TESSERA_TEST_METADATA", f"{host}:{METADATA_PORT}"))


@pytest.fixture(scope="session")
def pods(api: dynamic.DynamicClient, settings: dict[str, str]) -> Cluster:  # noqa: F811
    """The namespace of the pods."""
    return Cluster(api, settings["TESSERA_NAMESPACE"])


def wait(what: str, probe: Callable[[], Any]) -> Any:
    """The first true value of a probe."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := probe()):
        if time.monotonic() > deadline:
            pytest.fail(f"not after {PATIENCE_S:g} s: {what}")
        time.sleep(0.5)
    return value
