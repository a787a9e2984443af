"""What the chart installs, as the API server judges it; nothing is written (server-side dry run)."""

from typing import Any

import pytest
from kubernetes.dynamic.exceptions import DynamicApiError, ResourceNotFoundError

from infra.chart import render
from tests.cluster.conftest import Cluster
from tests.helm.cases import CASES

pytestmark = pytest.mark.cluster

OTHER_PROJECTS = {"PodMonitor", "ServiceMonitor"}
"""Kinds of Prometheus' operator, which the test cluster does not have."""


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
def test_the_api_server_takes_every_object(cluster: Cluster, values: dict[str, Any]) -> None:
    own = {**values, "namespace": {"name": cluster.namespace, "create": False}}
    objects = [each for each in render(own, namespace=cluster.namespace) if each["kind"] not in OTHER_PROJECTS]
    refused = []
    for each in objects:
        try:
            cluster.try_out(each)
        except ResourceNotFoundError:
            refused.append(f"{each['apiVersion']} {each['kind']} is not known")
        except DynamicApiError as error:
            refused.append(f"{each['kind']} {each['metadata']['name']}: {error}")
    assert refused == []
    assert objects
