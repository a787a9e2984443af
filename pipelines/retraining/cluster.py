"""`Retraining` objects and config maps at the API server of a cluster."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from components.core.base.errors import InputError
from components.core.base.kubernetes_api import kubernetes_errors
from pipelines.retraining.spec import GROUP, PLURAL, VERSION
from pipelines.retraining.status import RetrainingStatus

NOT_FOUND = 404
BUNDLE_ANNOTATION = f"{GROUP}/bundle"
"""Annotation of a Rollout: digest of the bundle that it is to serve."""
ROLLOUTS = ("argoproj.io", "v1alpha1")


@dataclass
class Retraining:
    """An object as the API server has it.

    Attributes:
        body: all of it.
        status: the part that the operator writes.
    """

    body: dict[str, Any]
    status: RetrainingStatus = field(init=False)

    def __post_init__(self) -> None:
        self.status = RetrainingStatus.model_validate(self.body.get("status") or {})

    @property
    def name(self) -> str:
        """Name of the object."""
        return str(self.body["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """Namespace of the object, its config map and its pods."""
        return str(self.body["metadata"]["namespace"])

    @property
    def annotations(self) -> dict[str, str]:
        """What a person has asked for."""
        return self.body["metadata"].get("annotations") or {}

    @property
    def created(self) -> datetime:
        """When the object was created."""
        return datetime.fromisoformat(self.body["metadata"]["creationTimestamp"])


class Objects(Protocol):
    """Reads and writes of the reconciliation at the API server."""

    def read(self, namespace: str, name: str) -> Retraining | None:
        """An object, None where it is absent."""

    def write_status(self, found: Retraining, status: RetrainingStatus) -> None:
        """Replace the status of an object, which becomes that of `found`.

        Raises:
            ClusterError: somebody else has changed the object since it was read.
        """

    def config_map(self, namespace: str, name: str, key: str) -> str:
        """A value of a config map.

        Raises:
            InputError: there is no such config map, or it has no such key.
        """

    def rollout(self, namespace: str, name: str) -> dict[str, Any] | None:
        """A Rollout of Argo Rollouts, None where it is absent."""


class ClusterObjects:
    """The objects of the cluster that `load_cluster` has chosen."""

    def read(self, namespace: str, name: str) -> Retraining | None:
        """Request the object."""
        from kubernetes.client import ApiException

        with kubernetes_errors():
            try:
                body = self._api.get_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name)
            except ApiException as error:
                if error.status == NOT_FOUND:
                    return None
                raise
        return Retraining(body)

    def write_status(self, found: Retraining, status: RetrainingStatus) -> None:
        """Replace the status; the resource version in the body lets the API server refuse a stale one."""
        body = found.body | {"status": status.dump()}
        with kubernetes_errors():
            written = self._api.replace_namespaced_custom_object_status(
                GROUP, VERSION, found.namespace, PLURAL, found.name, body
            )
        found.body, found.status = written, status.model_copy(deep=True)

    def config_map(self, namespace: str, name: str, key: str) -> str:
        """Request the config map."""
        from kubernetes.client import ApiException, CoreV1Api

        with kubernetes_errors():
            try:
                data = CoreV1Api().read_namespaced_config_map(name, namespace).data or {}
            except ApiException as error:
                if error.status != NOT_FOUND:
                    raise
                raise InputError(f"there is no config map {name!r} in namespace {namespace}") from None
        if key not in data:
            raise InputError(f"the config map {name!r} has no key {key!r}", hint=f"it has {', '.join(sorted(data))}")
        return str(data[key])

    def rollout(self, namespace: str, name: str) -> dict[str, Any] | None:
        """Request the Rollout."""
        from kubernetes.client import ApiException

        with kubernetes_errors():
            try:
                found: dict[str, Any] = self._api.get_namespaced_custom_object(*ROLLOUTS, namespace, "rollouts", name)
            except ApiException as error:
                if error.status == NOT_FOUND:
                    return None
                raise
        return found

    def merge(self, namespace: str, name: str, change: dict[str, Any]) -> None:
        """Merge values into an object, as a person does.

        Raises:
            ClusterError: there is no such object, or the API server refuses.
        """
        with kubernetes_errors():
            self._api.patch_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name, change)

    @property
    def _api(self) -> Any:
        from kubernetes.client import CustomObjectsApi

        return CustomObjectsApi()
