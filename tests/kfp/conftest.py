"""A Kubeflow Pipelines whose pods run this project: `make test-kfp`, with the variables that `tessera submit` reads.

TESSERA_KFP is its address, TESSERA_NAMESPACE the namespace of its pods, TESSERA_STORE an object store that pods and
this machine open. The namespace has the chart's config map and secret, and TESSERA_IMAGES names images that its nodes
have. KUBECONFIG opens the cluster to the tests that end pods.
"""

import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from kubernetes import dynamic

from components.core.store.store import LOCAL_FOLDER
from pipelines.run.kfp_server import KfpServer
from tests.cluster.api import Cluster
from tests.cluster.conftest import api  # noqa: F401  a fixture
from tests.kfp.ml_metadata import MlMetadata

NEEDED = ("TESSERA_KFP", "TESSERA_NAMESPACE", "TESSERA_STORE")
METADATA_PORT = 8080
"""Port of the service metadata-grpc-service."""


@pytest.fixture(scope="session", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables that say where everything is; working copies of the stores go to a folder of the tests."""
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        pytest.fail(f"{', '.join(missing)} are not set: TESSERA_STORE=s3://… make test-kfp KFP=http://… NAMESPACE=…")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LOCAL_FOLDER, str(tmp_path_factory.mktemp("local")))
        yield {name: os.environ[name] for name in NEEDED}


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
