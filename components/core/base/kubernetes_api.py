"""The Kubernetes cluster that a command works on, and its errors as ours."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from components.core.base.errors import ClusterError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient


def load_cluster() -> str:
    """Take the cluster that KUBECONFIG or ~/.kube/config names, or the one that this pod is in; returns its address.

    Raises:
        ClusterError: there is none.
    """
    from kubernetes import client, config

    with kubernetes_errors():
        if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
            config.load_incluster_config()
        else:
            config.load_kube_config(os.environ.get("KUBECONFIG"))
    return str(client.Configuration.get_default_copy().host)


@contextlib.contextmanager
def kubernetes_errors() -> Iterator[None]:
    """Turn errors of the Kubernetes client in the block into one of ours.

    Raises:
        ClusterError: there is no cluster, it does not answer, or it refuses.
    """
    from kubernetes.client import ApiException
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ConfigException as error:
        raise ClusterError(f"no cluster is configured: {error}", hint="set KUBECONFIG") from error
    except ApiException as error:
        raise ClusterError(f"the cluster answered {error.status}: {error.reason}{_explanation(error.body)}") from error
    except (HTTPError, OSError) as error:
        raise ClusterError(f"the cluster does not answer: {str(error)[:200]}", hint="check KUBECONFIG") from error


@contextlib.contextmanager
def api_client() -> Iterator["ApiClient"]:
    """A client of the cluster that `load_cluster` has taken; its connections are closed at the end of the block.

    Raises:
        ClusterError: there is no cluster, it does not answer, or it refuses.
    """
    from kubernetes.client import ApiClient

    with kubernetes_errors():
        api = ApiClient()
        try:
            yield api
        finally:
            api.rest_client.pool_manager.clear()


def _explanation(body: str | bytes | None) -> str:
    """What the API server says about a refusal, such as the field that is wrong; empty where it says nothing."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return f", {json.loads(body or '')['message']}"
    return ""
